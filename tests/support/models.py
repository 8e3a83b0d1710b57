"""Tiny random MoE models of the transformers families that the hooks are held to."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
_GROUPED: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}

# family -> class prefix, configuration beyond the common one
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 8, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_key_value_heads": 4}),
    "gpt_oss": ("GptOss", {"num_local_experts": 8}),
    "deepseek_v3": ("DeepseekV3", _GROUPED | _MLA),
    "glm4_moe": ("Glm4Moe", _GROUPED),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal LM of the family with random weights, routers included, in evaluation mode."""
    prefix, extra = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**(_COMMON | extra))
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "norm" not in name:
                scale = tensor.shape[-1] ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return model.eval().to(dtype)

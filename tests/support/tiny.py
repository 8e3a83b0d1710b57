"""Tiny random causal LMs of many transformers families, and the plainest decoding of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from decoder.model.cache import cache_argument

VOCAB = 64

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
}
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
_LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 4}

# Each family is here for something in its attention, router or cache that the others lack.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),  # the plain case
    "qwen2": ("Qwen2", {}),  # attention bias, layer_types
    "qwen3": ("Qwen3", {"head_dim": 16}),  # query and key norms, head_dim != H / heads
    "mistral": ("Mistral", {"sliding_window": 6}),  # window shorter than the sequences
    "gemma2": (  # score caps, alternating windows, logit cap, scaled embeddings
        "Gemma2",
        {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    ),
    "opt": (  # learned positions, no rotary embedding, ReLU
        "OPT",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "phi": ("Phi", {"partial_rotary_factor": 0.5}),  # partial rotary, parallel residual
    "mixtral": ("Mixtral", _LOCAL),
    "qwen2_moe": (  # shared expert, alternating dense layers
        "Qwen2Moe",
        {**_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 4}),  # norms across heads
    "deepseek_v3": ("DeepseekV3", _MLA),  # latent attention: keys and values of unequal width
    "glm4_moe": (  # sigmoid router with groups, partial rotary
        "Glm4Moe",
        {**_MLA, "num_key_value_heads": 2, "head_dim": 8, "n_shared_experts": 1},
    ),
    "gpt_oss": (  # sinks, windows, expert biases, interleaved transposed weights
        "GptOss",
        {**_LOCAL, "head_dim": 8, "sliding_window": 6, "num_key_value_heads": 2},
    ),
    "phimoe": ("Phimoe", {"num_local_experts": 8, "num_experts_per_tok": 2}),  # sparse mixer
    "granitemoe": ("GraniteMoe", _LOCAL),  # multipliers on embeddings, residuals and logits
}


def tiny_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A random two-layer model, weights large enough that greedy output varies."""
    name, extra = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**_BASE, **extra, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                scale = 1.5 * weight.shape[-1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            else:
                # Biases and norms away from 0 and 1, so that forgetting one shows.
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation("batched_mm")  # grouped_mm has no fp64
    return model.to(dtype).eval()


@torch.no_grad()
def greedy_reference(model: Any, prompt: list[int], count: int) -> list[int]:
    """Batch of one, transformers' own DynamicCache, one token at a time, fp32 arg-max."""
    cache = transformers.DynamicCache(config=model.config)
    ids, output = torch.tensor([prompt]), []
    state = {cache_argument(model): cache, "use_cache": True}
    for _ in range(count):
        logits = model(input_ids=ids, **state).logits[0, -1]
        output.append(int(logits.float().argmax()))
        ids = torch.tensor([[output[-1]]])
    return output


def random_prompts(count: int, seed: int = 0, low: int = 1, high: int = 12) -> list[list[int]]:
    """Prompts of ragged lengths in ``[low, high]``."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]

"""Random models in real architectures, for measurements that need no trained weights.

A random model's forward costs exactly what a trained one's does; only its text is meaningless, so
acceptance is set by the replay drafter instead of a real draft's skill.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from decoder.checkpoint.config import read_config
from decoder.checkpoint.folder import model_folder
from decoder.model import loading
from moesd_kernels import keep_quantized
from moesd_kernels.formats import KeepsScales

INIT_STD = 0.05
# Queries and keys three times as large as a normalised input's make attention sharp. With flat
# attention a random model's greedy text falls into a one-token loop, which routes to few experts.
ATTENTION_GAIN = 3.0


def moe_310m(num_experts_per_tok: int = 4, **overrides: Any) -> Qwen3MoeConfig:
    """310M-parameter Qwen3-MoE (14 % active) that two CPU cores decode in milliseconds."""
    fields: dict[str, Any] = {
        "num_hidden_layers": 6,
        "num_experts": 64,
        "num_experts_per_tok": num_experts_per_tok,
        "hidden_size": 512,
        "moe_intermediate_size": 512,
        "num_attention_heads": 8,
        "head_dim": 64,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return Qwen3MoeConfig(**fields | overrides)


def hybrid_300m(num_experts_per_tok: int = 4) -> Qwen3NextConfig:
    """300M-parameter Qwen3-Next: of four layers three keep a state, and all have 64 experts."""
    return Qwen3NextConfig(
        num_hidden_layers=8,
        num_experts=64,
        num_experts_per_tok=num_experts_per_tok,
        hidden_size=512,
        moe_intermediate_size=352,
        shared_expert_intermediate_size=352,
        num_attention_heads=8,
        head_dim=64,
        num_key_value_heads=2,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        vocab_size=4096,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )


# What has a name and no file; beside these the dense model that is as large as what a token of the
# first one uses.
RANDOM: dict[str, Callable[..., PreTrainedConfig]] = {
    "moe-310m": moe_310m,
    "hybrid-300m": hybrid_300m,
}
DENSE = "dense-310m"


def dense_like(moe: Qwen3MoeConfig) -> Qwen3Config:
    """The dense model of equal active size: one MLP as wide as the K experts a token uses."""
    shared = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "head_dim",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
    )
    width = moe.num_experts_per_tok * moe.moe_intermediate_size
    return Qwen3Config(intermediate_size=width, **{name: getattr(moe, name) for name in shared})


def draft_like(target: PreTrainedConfig) -> Qwen3Config:
    """A one-layer dense draft with the target's vocabulary; run for its cost, not its proposals."""
    return Qwen3Config(
        num_hidden_layers=1,
        hidden_size=256,
        intermediate_size=768,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=target.vocab_size,
        max_position_embeddings=target.max_position_embeddings,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )


def random_model(
    config: PreTrainedConfig,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """Build ``config``'s architecture with seeded random weights directly on ``device``.

    Matrices are N(0, 0.05²), norms one, biases zero, queries and keys enlarged by
    ``ATTENTION_GAIN``; drawn tensor by tensor in ``dtype``, so the peak memory is the model itself
    even when it fills the device.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(_vector_fill(name))
                continue
            std = INIT_STD
            if "q_proj" in name or "k_proj" in name:
                std = ATTENTION_GAIN * parameter.shape[-1] ** -0.5
            for part in parameter if parameter.dim() == 3 else (parameter,):
                part.normal_(0.0, std, generator=generator)
        _restore_buffers(model)
    model.tie_weights()
    return model.eval()


def _vector_fill(name: str) -> float:
    if name.endswith("bias"):
        return 0.0
    return ATTENTION_GAIN if "q_norm" in name or "k_norm" in name else 1.0


def _restore_buffers(model: PreTrainedModel) -> None:
    """Rotary tables are computed, not loaded: ``to_empty`` left them uninitialised."""
    for module in model.modules():
        if hasattr(module, "inv_freq") and hasattr(module, "config"):
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                getattr(module, name).copy_(buffer)


def load_subject(
    target: str,
    draft: str | None,
    dtype: torch.dtype,
    device: torch.device | str,
    top_k: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target and a draft by name (of ``RANDOM``, ``DENSE``) or by path.

    Args:
        draft: path; by default a random one-layer draft that fits the target's vocabulary.
        top_k: overrides the target's experts per token, without retraining, as the paper does.
    """
    if (config := named_config(target, top_k)) is not None:
        model = random_model(config, dtype, device)
    else:
        override = {"num_experts_per_tok": top_k} if top_k else {}
        model = require_known_format(load_model(target, dtype, device, **override), target)
    return model, load_draft(draft, model, dtype, device)


def named_config(target: str, top_k: int | None = None) -> PreTrainedConfig | None:
    """The configuration of a random target by its name, ``None`` of a path."""
    override = {"num_experts_per_tok": top_k} if top_k else {}
    if target == DENSE:
        return dense_like(moe_310m(**override))
    return RANDOM[target](**override) if target in RANDOM else None


def load_draft(
    draft: str | None, target: PreTrainedModel, dtype: torch.dtype, device: torch.device | str
) -> PreTrainedModel:
    """A draft by path, or a random one-layer draft that fits the target's vocabulary."""
    if draft is None:
        return random_model(draft_like(target.config), dtype, device, seed=1)
    return load_model(draft, dtype, device)


def load_model(path: str, dtype: torch.dtype, device: torch.device | str, **config: Any) -> Any:
    """A causal LM from disk, in evaluation mode; ``config`` overrides its configuration.

    Raises:
        ValueError: nothing that can be loaded, or an override for a GGUF file, whose configuration
            is its own.
    """
    if not config:
        return loading.load_model(path, dtype=dtype, device=device)
    if path.endswith(".gguf"):
        raise ValueError(f"{path} is run as it is, got {config}")
    folder = model_folder(path)
    with keep_quantized(others=False):
        read_config(folder, tensors=0)  # whether its weights are what transformers takes them for
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, **config
        )
    return model.to(device).eval()


def require_known_format(model: Any, path: str | Path) -> Any:
    """``model``, a target, where a line can say how its weights are stored.

    Raises:
        ValueError: a folder of our own integers: they would be called plain, and transformers
            would be timed unpacking them at every step.
    """
    packed = any(isinstance(module, KeepsScales) for module in model.modules())
    if packed and not str(path).endswith(".gguf"):
        raise ValueError(
            f"{path} holds quantised weights, expected plain ones, which --weight-format quantises"
        )
    return model

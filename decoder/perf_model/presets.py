"""Well-known architectures by name, built from transformers' config classes without a network.

The numbers are those of the published ``config.json`` files; ``tests`` check the parameter totals.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .config_spec import MXFP4_BYTES, spec_from_config
from .model_spec import ModelSpec, eagle_spec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _shape(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }


def _experts(kind: str, experts: int, top_k: int, inner: int | None = None) -> dict[str, Any]:
    local = ("mixtral", "gpt_oss", "kimi_linear", "granitemoehybrid")
    names = dict.fromkeys(local, "num_local_experts")
    names |= {"deepseek_v2": "n_routed_experts", "deepseek_v3": "n_routed_experts"}
    fields = {names.get(kind, "num_experts"): experts, "num_experts_per_tok": top_k}
    return fields if inner is None else fields | {"moe_intermediate_size": inner}


_DEEPSEEK_V3 = {
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_shared_experts": 1, "first_k_dense_replace": 3,
}  # fmt: skip
_DEEPSEEK_LITE = _DEEPSEEK_V3 | {
    "q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip


def _opt(hidden: int, inner: int, layers: int, heads: int, embed: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "ffn_dim": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "vocab_size": 50272, "word_embed_proj_dim": embed,
    }  # fmt: skip


_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-57b-a14b": (
        "qwen2_moe",
        _shape(3584, 18944, 28, 28, 4, 151936)
        | _experts("qwen2_moe", 64, 8, 2560)
        | {"shared_expert_intermediate_size": 20480},
    ),
    "qwen1.5-moe-a2.7b": (
        "qwen2_moe",
        _shape(2048, 5632, 24, 16, 16, 151936)
        | _experts("qwen2_moe", 60, 4, 1408)
        | {"shared_expert_intermediate_size": 5632},
    ),
    "qwen2-0.5b": (
        "qwen2",
        _shape(896, 4864, 24, 14, 2, 151936) | {"tie_word_embeddings": True},
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        _shape(2048, 6144, 48, 32, 4, 151936)
        | _experts("qwen3_moe", 128, 8, 768)
        | {"head_dim": 128},
    ),
    "qwen3-235b-a22b": (
        "qwen3_moe",
        _shape(4096, 12288, 94, 64, 4, 151936)
        | _experts("qwen3_moe", 128, 8, 1536)
        | {"head_dim": 128},
    ),
    "qwen3-0.6b": (
        "qwen3",
        _shape(1024, 3072, 28, 16, 8, 151936) | {"head_dim": 128, "tie_word_embeddings": True},
    ),
    "mixtral-8x7b": ("mixtral", _shape(4096, 14336, 32, 32, 8, 32000) | _experts("mixtral", 8, 2)),
    "olmoe": ("olmoe", _shape(2048, 1024, 16, 16, 16, 50304) | _experts("olmoe", 64, 8)),
    "deepseek-v2-lite": (
        "deepseek_v2",
        _shape(2048, 10944, 27, 16, 16, 102400)
        | _experts("deepseek_v2", 64, 6, 1408)
        | _DEEPSEEK_LITE,
    ),
    "deepseek-v3": (
        "deepseek_v3",
        _shape(7168, 18432, 61, 128, 128, 129280)
        | _experts("deepseek_v3", 256, 8, 2048)
        | _DEEPSEEK_V3,
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        _shape(2880, 2880, 24, 64, 8, 201088) | _experts("gpt_oss", 32, 4) | {"head_dim": 64},
    ),
    "gpt-oss-120b": (
        "gpt_oss",
        _shape(2880, 2880, 36, 64, 8, 201088) | _experts("gpt_oss", 128, 4) | {"head_dim": 64},
    ),
    "opt-30b": ("opt", _opt(7168, 28672, 48, 56, 7168)),
    "opt-350m": ("opt", _opt(1024, 4096, 24, 16, 512)),
    "llama-3.1-8b": ("llama", _shape(4096, 14336, 32, 32, 8, 128256)),
}


def _attention_at(layers: int, indices: Iterable[int], other: str) -> dict[str, list[str]]:
    places = frozenset(indices)
    return {"layer_types": ["full_attention" if i in places else other for i in range(layers)]}


# Hybrids: some layers keep a recurrent state or a convolution window instead of a cache.
_PRESETS |= {
    "qwen3-next-80b-a3b": (
        "qwen3_next",
        _shape(2048, 5120, 48, 16, 2, 151936)
        | _experts("qwen3_next", 512, 10, 512)
        | _attention_at(48, range(3, 48, 4), "linear_attention")
        | {"shared_expert_intermediate_size": 512, "head_dim": 256},
    ),
    "qwen3.5-35b-a3b": (
        "qwen3_5_moe_text",
        _shape(2048, 5120, 40, 16, 2, 248320)
        | _experts("qwen3_5_moe_text", 256, 8, 512)
        | _attention_at(40, range(3, 40, 4), "linear_attention")
        | {"shared_expert_intermediate_size": 512, "head_dim": 256},
    ),
    "kimi-linear-48b-a3b": (
        "kimi_linear",
        _shape(2304, 9216, 27, 32, 32, 163840)
        | _experts("kimi_linear", 256, 8, 1024)
        | _attention_at(27, (3, 7, 11, 15, 19, 23, 26), "linear_attention"),
    ),
    "granite-4.0-h-small": (
        "granitemoehybrid",
        _shape(4096, 768, 40, 32, 8, 100352)
        | _experts("granitemoehybrid", 72, 10)
        | _attention_at(40, (5, 15, 25, 35), "linear_attention")
        | {
            "shared_intermediate_size": 1536, "mamba_n_heads": 128, "mamba_d_head": 64,
            "mamba_d_state": 128, "tie_word_embeddings": True,
        },
    ),
    "nemotron-3-nano-30b-a3b": (
        "nemotron_h",
        {
            "hidden_size": 2688, "vocab_size": 131072, "num_attention_heads": 32,
            "num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 64,
            "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
            "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "hybrid_override_pattern": "MEMEM*E" + "MEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME",
        },
    ),
    "lfm2-8b-a1b": (
        "lfm2_moe",
        _shape(2048, 7168, 24, 32, 8, 65536)
        | _experts("lfm2_moe", 32, 4, 1792)
        | _attention_at(24, (2, 6, 10, 14, 18, 21), "conv"),
    ),
}  # fmt: skip
_ALIASES = {
    "nvidia-nemotron-3-nano-30b-a3b-bf16": "nemotron-3-nano-30b-a3b",
    "olmoe-1b-7b": "olmoe",
    "mixtral": "mixtral-8x7b",
    "qwen2-57b": "qwen2-57b-a14b",
    "qwen3-30b": "qwen3-30b-a3b",
    "qwen1.5-moe": "qwen1.5-moe-a2.7b",
    "deepseek-r1": "deepseek-v3",
}
# (target, draft) of the paper's tables; "eagle" is a head on the target
PAPER_PAIRS = {
    "qwen2-57b-a14b": "qwen2-0.5b",
    "mixtral-8x7b": "eagle",
    "opt-30b": "opt-350m",
}


def preset_names() -> list[str]:
    """Names that ``preset_config`` knows."""
    return sorted(_PRESETS)


def is_preset(name: str) -> bool:
    """Whether ``name`` (any case, an organisation prefix or -Instruct suffix allowed) is known."""
    return _canonical(name) in _PRESETS


def preset_config(name: str) -> PretrainedConfig:
    """The transformers config of a known architecture.

    Raises:
        ValueError: unknown name; the message lists near ones.
    """
    key = _canonical(name)
    if key not in _PRESETS:
        near = difflib.get_close_matches(key, preset_names(), n=3) or preset_names()
        raise ValueError(f"unknown preset {name!r}; did you mean one of {near}?")
    from transformers import AutoConfig

    kind, fields = _PRESETS[key]
    config = AutoConfig.for_model(kind, **fields)
    config.dtype = "bfloat16"
    return config


def preset_spec(name: str) -> ModelSpec:
    """Bytes and FLOPs of a known architecture as published: bf16, gpt-oss with 4-bit experts."""
    spec = spec_from_config(preset_config(name), _canonical(name))
    return spec.with_weight_bytes(2.0, MXFP4_BYTES) if "gpt-oss" in spec.name else spec


def paper_draft_spec(target: str) -> ModelSpec:
    """The draft the paper pairs with ``target``, or an EAGLE head where it names none."""
    draft = PAPER_PAIRS.get(_canonical(target), "eagle")
    return eagle_spec(preset_spec(target)) if draft == "eagle" else preset_spec(draft)


def _canonical(name: str) -> str:
    key = name.lower().rsplit("/", 1)[-1].replace("_", "-")
    for suffix in ("-v0.1", "-0125", "-0924", "-2507", "-instruct", "-chat", "-base"):
        key = key.removesuffix(suffix)
    key = key.removesuffix("-instruct")
    return _ALIASES.get(key, key)

"""Reads a ``ModelSpec`` from a transformers config, or from the dict of a ``config.json``.

No weights are read, so models far too large for the machine can be planned for. Norm and gate
vectors are counted only where they are more than rounding: totals agree with the real models to
about 0.1 %. Recurrent and linear-attention layers are refused: their state cannot be rolled back by
masking, so the decoder does not run them either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from decoder.checkpoint.counts import MOST_OBJECTS, is_positive, require_countable
from decoder.errors import explained

from .model_spec import WEIGHT_BYTES, LayerSpec, ModelSpec

_UNGATED = {"opt", "gpt2", "gpt_neox", "gpt_neo", "phi", "starcoder2", "falcon", "nemotron"}
_UNGROUPED = {"opt", "gpt2", "gpt_neox", "gpt_neo"}  # ignore num_key_value_heads
_QKV_BIAS = {"qwen2", "qwen2_moe", "qwen1_5_moe"}
MXFP4_BYTES = WEIGHT_BYTES["mxfp4"]


def spec_from_config(config: Any, name: str | None = None) -> ModelSpec:
    """Read a transformers config object, or the dict of a ``config.json``.

    Raises:
        NotImplementedError: layers with recurrent state.
        ValueError: a field the count needs is missing.
    """
    fields = _fields(config)
    kind = fields.get("model_type", "")
    num_layers = _need(fields, "num_hidden_layers", "n_layer")
    for layer_type in set(fields.get("layer_types") or ()):
        if "attention" not in layer_type or layer_type == "linear_attention":
            raise NotImplementedError(
                f"layer type {layer_type!r} of {kind!r}: recurrent state cannot be rolled back"
            )
    hidden = _need(fields, "hidden_size", "n_embd")
    vocab = _need(fields, "vocab_size")
    embed_width = fields.get("word_embed_proj_dim") or hidden
    embedding = vocab * embed_width
    if kind in ("opt", "gpt2"):
        embedding += (fields.get("max_position_embeddings") or 0) * hidden
    if embed_width != hidden:
        embedding += 2 * embed_width * hidden
    dense_bytes, expert_bytes = _weight_bytes(fields)
    return ModelSpec(
        name=name or fields.get("_name_or_path") or kind or "model",
        hidden=hidden,
        vocab=vocab,
        layers=tuple(_layer(fields, kind, hidden, index) for index in range(num_layers)),
        embedding=embedding,
        head=vocab * embed_width,
        tied=bool(fields.get("tie_word_embeddings", kind in ("opt", "gpt2"))),
        dense_bytes=dense_bytes,
        expert_bytes=expert_bytes,
    )


def _fields(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        require_countable(config, "config", MOST_OBJECTS)
        kind = config.get("model_type")
        if kind:
            from transformers import AutoConfig

            rest = {key: value for key, value in config.items() if key != "model_type"}
            with explained(f"config describes no {kind!r}"):
                try:  # fills the defaults that a config.json leaves out
                    config = AutoConfig.for_model(kind, **rest)
                except (ValueError, KeyError):  # a model this transformers does not know
                    return config.get("text_config") or config
        else:
            return config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if not hasattr(config, "to_dict"):
        raise ValueError(f"config must be a transformers config or a dict, got {type(config)}")
    fields: dict[str, Any] = config.to_dict()
    for old, new in getattr(config, "attribute_map", {}).items():
        fields.setdefault(old, fields.get(new))
    fields.setdefault("model_type", getattr(config, "model_type", ""))
    return fields


def _need(fields: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if fields.get(name) is not None:
            value: int = fields[name]
            if not is_positive(value):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
            return value
    raise ValueError(f"config must have {' or '.join(names)}, got fields {sorted(fields)[:40]}")


def _weight_bytes(fields: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes per dense and per expert parameter; bf16 unless the config says otherwise."""
    method = str((fields.get("quantization_config") or {}).get("quant_method", ""))
    if method == "mxfp4":  # gpt-oss: the experts only
        return 2.0, MXFP4_BYTES
    if "fp8" in method:
        return WEIGHT_BYTES["fp8"], WEIGHT_BYTES["fp8"]
    dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")
    return (4.0, 4.0) if "float32" in dtype else (2.0, 2.0)


def _layer(fields: Mapping[str, Any], kind: str, hidden: int, index: int) -> LayerSpec:
    attention, query_width, kv_width = _attention(fields, kind, hidden)
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    layer_types = fields.get("layer_types")
    if layer_types and layer_types[index] != "sliding_attention":
        window = None
    base = LayerSpec(attention, query_width, kv_width, window, dense=0)
    if not _is_sparse(fields, index):
        inner = _need(fields, "intermediate_size", "ffn_dim", "n_inner")
        matrices = 2 if kind in _UNGATED else 3
        return replace(base, dense=matrices * hidden * inner)
    experts = _num_experts(fields)
    inner = int(fields.get("moe_intermediate_size") or _need(fields, "intermediate_size"))
    shared = int(fields.get("shared_expert_intermediate_size") or 0)
    shared += int(fields.get("n_shared_experts") or 0) * inner
    bias = 2 * inner + hidden if kind == "gpt_oss" else 0
    return replace(
        base,
        dense=3 * hidden * shared + hidden * experts,
        expert=3 * hidden * inner + bias,
        num_experts=experts,
        top_k=_need(fields, "num_experts_per_tok", "moe_topk", "top_k_experts"),
    )


def _num_experts(fields: Mapping[str, Any]) -> int:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if fields.get(name):
            return int(fields[name])
    return 0


def _is_sparse(fields: Mapping[str, Any], index: int) -> bool:
    if not _num_experts(fields):
        return False
    types = fields.get("mlp_layer_types")
    if types:
        return bool(types[index] == "sparse")
    if index < (fields.get("first_k_dense_replace") or 0):
        return False
    if index in (fields.get("mlp_only_layers") or ()):
        return False
    step = fields.get("decoder_sparse_step") or 1
    if (index + 1) % step:
        return False
    return index % (fields.get("moe_layer_freq") or 1) == 0


def _attention(fields: Mapping[str, Any], kind: str, hidden: int) -> tuple[int, int, int]:
    """Projection parameters, query width (see LayerSpec), cached elements per token."""
    heads = _need(fields, "num_attention_heads", "n_head")
    if fields.get("kv_lora_rank"):
        return _latent_attention(fields, hidden, heads)
    grouped = kind not in _UNGROUPED and fields.get("num_key_value_heads")
    kv_heads = int(grouped or heads)
    head_dim = int(fields.get("head_dim") or hidden // heads)
    params = 2 * hidden * head_dim * (heads + kv_heads)
    if fields.get("attention_bias") or kind in _QKV_BIAS:
        params += head_dim * (heads + 2 * kv_heads)
    return params, heads * head_dim, 2 * kv_heads * head_dim


def _latent_attention(fields: Mapping[str, Any], hidden: int, heads: int) -> tuple[int, int, int]:
    """Multi-head latent attention, cached in latent form and computed absorbed (as engines do)."""
    rank, rope = int(fields["kv_lora_rank"]), _need(fields, "qk_rope_head_dim")
    nope, value = _need(fields, "qk_nope_head_dim"), _need(fields, "v_head_dim")
    query_out = heads * (nope + rope)
    query_rank = int(fields.get("q_lora_rank") or 0)
    query = query_rank * (hidden + query_out) if query_rank else hidden * query_out
    params = query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    return params, heads * (2 * rank + rope) // 2, rank + rope

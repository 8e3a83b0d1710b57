"""Feed-forward blocks by their config: dense, or routed experts with what every token reads."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import Fields, need, optional, per_layer

_UNGATED = {
    "opt", "gpt2", "gpt_neox", "gpt_neo", "phi", "starcoder2", "falcon", "nemotron", "nemotron_h",
    "arcee", "nanochat", "apertus", "persimmon", "jais2", "xglm", "biogpt",
}  # fmt: skip
_SHARES_ONE = {"llama4_text", "hunyuan_v1_moe"}  # as wide as a routed expert, in no field


@dataclass(frozen=True, slots=True)
class FeedForward:
    """Parameters as in ``LayerSpec``."""

    dense: int = 0
    expert: int = 0
    num_experts: int = 0
    top_k: int = 0


def feed_forward(kind: str, fields: Fields, index: int, layer_type: str | None) -> FeedForward:
    """The block of one layer.

    Args:
        layer_type: its name in ``layer_types``; ``"moe"`` and ``"mlp"`` decide by themselves.

    Raises:
        ValueError: a field is missing or no positive integer.
    """
    fields = _of_layer(fields, index)
    hidden = need(fields, "hidden_size", "n_embd")
    matrices = 2 if kind in _UNGATED else 3
    if not _is_sparse(kind, fields, index, layer_type):
        return FeedForward(dense=matrices * hidden * _dense_inner(kind, fields))
    experts = _num_experts(fields)
    inner = optional(fields, "moe_intermediate_size") or need(fields, "intermediate_size")
    latent = optional(fields, "moe_latent_size")  # experts between two projections of all tokens
    bias = 2 * inner + hidden if kind == "gpt_oss" else 0
    shared = matrices * hidden * _shared_inner(kind, fields, inner)
    return FeedForward(
        dense=shared + hidden * experts + 2 * hidden * latent,
        expert=matrices * (latent or hidden) * inner + bias,
        num_experts=experts,
        top_k=need(fields, "num_experts_per_tok", "moe_topk", "top_k_experts"),
    )


def _of_layer(fields: Fields, index: int) -> Fields:
    """HunYuan's have, of what experts are, a number for all layers or a list of each layer's."""
    names = ("num_experts", "num_experts_per_tok", "moe_topk", "moe_intermediate_size")
    lists = {name: fields[name] for name in names if isinstance(fields.get(name), list | tuple)}
    return {**fields, **{name: v[index] for name, v in lists.items() if index < len(v)}}


def _num_experts(fields: Fields) -> int:
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if fields.get(name):
            return need(fields, name)
    return 0


def _dense_inner(kind: str, fields: Fields) -> int:
    if kind == "granitemoehybrid":  # a dense one has the block that others share
        return need(fields, "shared_intermediate_size")
    if kind == "llama4_text":
        return need(fields, "intermediate_size_mlp")
    inner = need(fields, "intermediate_size", "ffn_dim", "n_inner")
    if kind == "lfm2" and fields.get("block_auto_adjust_ff_dim"):
        scale, unit = fields.get("block_ffn_dim_multiplier"), need(fields, "block_multiple_of")
        if not (isinstance(scale, int | float) and 0 < scale < 1e6):
            raise ValueError(f"block_ffn_dim_multiplier must be a positive number, got {scale!r}")
        inner = -(-int(scale * int(2 * inner / 3)) // unit) * unit
    return inner


def _shared_inner(kind: str, fields: Fields, inner: int) -> int:
    """Width of what every token reads beside its experts."""
    if kind == "nemotron_h":
        return need(fields, "moe_shared_expert_intermediate_size")
    one = optional(fields, "shared_expert_intermediate_size")
    one += optional(fields, "shared_intermediate_size")
    if kind in _SHARES_ONE:
        return inner
    # One number by several names: families map one to another.
    names = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    return one + max(optional(fields, name) for name in names) * inner


def _is_sparse(kind: str, fields: Fields, index: int, layer_type: str | None) -> bool:
    if layer_type in ("moe", "mlp"):
        return layer_type == "moe"
    experts = _num_experts(fields)
    if not experts:
        return False
    types = per_layer(fields, "mlp_layer_types", need(fields, "num_hidden_layers", "n_layer"))
    if types:
        return types[index] == "sparse"
    if kind == "llama4_text":
        return index in (fields.get("moe_layers") or ())
    if kind == "ernie4_5_moe":
        last = fields.get("moe_layer_end_index", -1)
        if index < optional(fields, "moe_layer_start_index") or -1 < last < index:
            return False
        return (index + 1) % (optional(fields, "moe_layer_interval") or 1) == 0
    if kind == "jamba":
        period, offset = (
            need(fields, "expert_layer_period"),
            optional(fields, "expert_layer_offset"),
        )
        return experts > 1 and index % period == offset
    if index < max(optional(fields, "first_k_dense_replace"), optional(fields, "num_dense_layers")):
        return False
    if index in (fields.get("mlp_only_layers") or ()):
        return False
    if (index + 1) % (optional(fields, "decoder_sparse_step") or 1):
        return False
    return index % (optional(fields, "moe_layer_freq") or 1) == 0

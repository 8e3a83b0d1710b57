"""Softmax attention by its config: projections, and what it caches per token."""

from __future__ import annotations

from .fields import Fields, need, optional
from .mixer import Mixer

_UNGROUPED = {"opt", "gpt2", "gpt_neox", "gpt_neo"}  # ignore num_key_value_heads
_QKV_BIAS = {"qwen2", "qwen2_moe", "qwen1_5_moe"}
_GATED = {
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "afmoe",
    "beam",
}  # a gate beside each query


def attention(kind: str, fields: Fields) -> Mixer:
    """The attention of a family's layers.

    Raises:
        ValueError: a field is missing or no positive integer.
    """
    hidden, heads = (
        need(fields, "hidden_size", "n_embd"),
        need(fields, "num_attention_heads", "n_head"),
    )
    if fields.get("kv_lora_rank"):
        gate = hidden * heads if kind == "bailing_hybrid" else 0
        return _latent(fields, hidden, heads) + Mixer(gate)
    grouped = kind not in _UNGROUPED and optional(fields, "num_key_value_heads")
    kv_heads = grouped or heads
    head_dim = optional(fields, "head_dim") or hidden // heads
    params = hidden * head_dim * (2 * (heads + kv_heads) + heads * (kind in _GATED))
    if fields.get("attention_bias") or kind in _QKV_BIAS:
        params += head_dim * (heads + 2 * kv_heads)
    return Mixer(params, query_width=heads * head_dim, kv_width=2 * kv_heads * head_dim)


def _latent(fields: Fields, hidden: int, heads: int) -> Mixer:
    """Multi-head latent attention, cached in latent form and computed absorbed (as engines do)."""
    rank, rope = need(fields, "kv_lora_rank"), need(fields, "qk_rope_head_dim")
    nope, value = need(fields, "qk_nope_head_dim"), need(fields, "v_head_dim")
    query_out = heads * (nope + rope)
    query_rank = optional(fields, "q_lora_rank")
    query = query_rank * (hidden + query_out) if query_rank else hidden * query_out
    params = query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    return Mixer(params, query_width=heads * (2 * rank + rope) // 2, kv_width=rank + rope)

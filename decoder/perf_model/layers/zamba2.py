"""Zamba2's hybrid layers: one transformer block, or a few, shared by many layers of Mamba-2."""

from __future__ import annotations

from .fields import Fields, need
from .mixer import Mixer


def shared_block(fields: Fields) -> tuple[Mixer, int, int]:
    """What a hybrid layer has beside its Mamba-2 mixer.

    The block reads the hidden state and the embedding side by side; adapters (low rank) and the
    projection behind it are each layer's own.

    Returns:
        attention with the layer's own projection, parameters of the MLP, and how many of both
        together are shared with other layers.
    """
    hidden, inner = need(fields, "hidden_size"), need(fields, "intermediate_size")
    heads, kv_heads = need(fields, "num_attention_heads"), need(fields, "num_key_value_heads")
    rank, head_dim = need(fields, "adapter_rank"), 2 * hidden // heads
    attention = 2 * hidden * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
    adapters = 3 * 4 * hidden * rank if fields.get("use_shared_attention_adapter") else 0
    mixer = Mixer(
        params=attention + adapters + hidden**2,
        query_width=heads * head_dim,
        kv_width=2 * kv_heads * head_dim,
    )
    mlp = 3 * hidden * inner
    return mixer, mlp + rank * (hidden + 2 * inner), attention + mlp


def repeated(fields: Fields, hybrid_layers: int) -> int:
    """Parameters that layers share with earlier ones: read by each of them, stored once."""
    blocks = min(need(fields, "num_mem_blocks"), hybrid_layers)
    return (hybrid_layers - blocks) * shared_block(fields)[2] if hybrid_layers else 0

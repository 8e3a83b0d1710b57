"""A layer's attention half as a stack takes it: queries, keys and values as one product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..packed import StoredWeight, stored_weight
from .joined import joined, may_join

_SQUARE = 128  # rows of FP8 weights that share a scale


def add_attention(stack: Any, layer: Any, following: tuple[Tensor, float], window: int) -> None:
    """Append a layer with its attention half to the stack.

    Args:
        stack: an empty one, or one of earlier layers.
        layer: norm, attention (maybe with norms of heads), norm, MLP, named as in Llama.
        following: weight and epsilon of the norm after the layer.
        window: of the attention, in positions; 0 is all of them.
    """
    attention = layer.self_attn
    weights, scales, biases = projections(layer)
    query_heads, kv_heads = (weight.shape[0] // attention.head_dim for weight in weights[:2])
    has_norms = getattr(attention, "q_norm", None) is not None
    q_weight, q_eps = norm_of(attention.q_norm) if has_norms else (None, 0.0)
    k_weight, k_eps = norm_of(attention.k_norm) if has_norms else (None, 0.0)
    post_weight, post_eps = norm_of(layer.post_attention_layernorm)
    next_weight, next_eps = following
    stack.add_layer(
        joined(weights),
        joined(biases) if biases else None,
        q_weight,
        k_weight,
        attention.o_proj.weight,
        attention.o_proj.bias,
        post_weight,
        next_weight,
        [q_eps, k_eps, post_eps, next_eps],
        attention.scaling,
        window,
        query_heads,
        kv_heads,
    )
    query = stored_weight(attention.q_proj)
    tell_format(stack, "qkv", query._replace(scale=joined(scales) if scales else None))
    tell_format(stack, "out", stored_weight(attention.o_proj))


def tell_format(stack: Any, name: str, stored: StoredWeight) -> None:
    """Tell the stack how a weight of the layer added last, or the head, is stored."""
    if stored.weight_format != "plain":  # which they are until they are said not to be
        stack.set_format(name, *stored[1:])


def norm_of(module: Any) -> tuple[Tensor, float]:
    """Weight and epsilon of an RMS norm."""
    return module.weight, module.variance_epsilon


def projections(layer: Any) -> list[list[nn.Parameter]]:
    """Weights of queries, keys and values, and their scales and biases if there are any."""
    linears = _linears(layer)
    stored = [stored_weight(linear) for linear in linears]
    beside = [[weight.scale for weight in stored], [linear.bias for linear in linears]]
    return [[part.weight for part in stored], *([] if None in part else part for part in beside)]


def joining_obstacle(layer: Any) -> str | None:
    """Why the three projections cannot become one, or None."""
    stored = [stored_weight(linear) for linear in _linears(layer)]
    if len({weight[2:] for weight in stored}) > 1:
        return "queries, keys and values are in more than one weight format"
    # Scales follow each other as rows do: one a row, or one for each whole square.
    if any(
        s is not None and w.shape[0] not in (len(s), _SQUARE * len(s)) for w, s, *_ in stored[:-1]
    ):
        return "the scales of queries, keys and values are not those of all their rows together"
    if not all(map(may_join, projections(layer))):
        return "weights share memory with other tensors, as of a state dict that is held"
    return None


def _linears(layer: Any) -> list[Any]:
    attention = layer.self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]

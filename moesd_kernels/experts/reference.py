"""The expert layer in PyTorch: the specification, and the portable back-end.

``fused_experts_reference`` is the definition: one pass per expert, everything in at least fp32,
and in fp64 when given fp64, which makes it the oracle of the tests. ``fused_experts_torch`` is what
runs where no compiled back-end does; it keeps the matrix products in the model's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import apply_activation


def fused_experts_reference(
    hidden_states: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    activation_limit: float | None = None,
    activation_alpha: float | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``out[t] = sum_k topk_weights[t, k] * expert[topk_ids[t, k]](hidden_states[t])``.

    Arguments are those of :func:`moesd_kernels.fused_experts`, already checked. Computes in fp32,
    or fp64 for fp64 inputs, and rounds once at the end. Differentiable.
    """
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    x = hidden_states.to(dtype)
    weighted = x.new_zeros(*topk_ids.shape, hidden_states.shape[1])  # [T, K, H]
    for expert in range(w_down.shape[0]):
        token, k = torch.where(topk_ids == expert)
        up_weight, down_weight = w_gate_up[expert].to(dtype), w_down[expert].to(dtype)
        if transposed:
            up_weight, down_weight = up_weight.T, down_weight.T
        projected = x[token] @ up_weight.T
        if gate_up_bias is not None:
            projected = projected + gate_up_bias[expert].to(dtype)
        active = apply_activation(
            projected,
            activation=activation,
            gated=gated,
            interleaved=interleaved,
            limit=activation_limit,
            alpha=activation_alpha,
        )
        y = active @ down_weight.T
        if down_bias is not None:
            y = y + down_bias[expert].to(dtype)
        weighted = weighted.index_put((token, k), y * topk_weights[token, k, None].to(dtype))
    result = weighted.sum(dim=1).to(hidden_states.dtype)
    return result if out is None else out.copy_(result)


def fused_experts_torch(
    hidden_states: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    activation_limit: float | None = None,
    activation_alpha: float | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The same sum with matrix products in the model's dtype, over the active experts only.

    Pairs are sorted by expert once, so an expert's rows are one slice. The activation and the
    weighted sum are in fp32. Reads the expert counts on the host: on a GPU this waits for the
    device and cannot be captured in a graph. Differentiable.

    With ``batch_invariant`` every pair is a product of its own, so that its shape, and with it the
    order of summation, never depends on the other rows. Slow; the compiled back-ends do better.
    """
    (T, K), E, H = topk_ids.shape, w_down.shape[0], hidden_states.shape[1]
    pair_ids = topk_ids.reshape(-1).to(torch.int64)
    valid = (pair_ids >= 0) & (pair_ids < E)
    order = torch.where(valid, pair_ids, E).argsort(stable=True)  # [N], dropped pairs last
    counts = torch.bincount(pair_ids[valid], minlength=E).tolist()
    pieces = []
    start = 0
    for expert, count in enumerate(counts):
        rows = order[start : start + count]
        start += count
        for part in rows.split(1 if batch_invariant else max(count, 1)):
            projected = _linear(
                hidden_states[part // max(K, 1)], w_gate_up, gate_up_bias, expert, transposed
            )
            active = apply_activation(
                projected.float() if projected.dtype != torch.float64 else projected,
                activation=activation,
                gated=gated,
                interleaved=interleaved,
                limit=activation_limit,
                alpha=activation_alpha,
            ).to(hidden_states.dtype)
            pieces.append(_linear(active, w_down, down_bias, expert, transposed))
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    weighted = torch.zeros(T * K, H, dtype=dtype, device=hidden_states.device)
    if pieces:
        kept = order[:start]
        pair_weights = topk_weights.reshape(-1)[kept].to(dtype)
        weighted = weighted.index_put((kept,), torch.cat(pieces).to(dtype) * pair_weights[:, None])
    result = weighted.view(T, K, H).sum(dim=1).to(hidden_states.dtype)
    return result if out is None else out.copy_(result)


def _linear(
    x: Tensor, weights: Tensor, biases: Tensor | None, expert: int, transposed: bool
) -> Tensor:
    """``x @ W + b`` for one expert's slice of [E, out, in] (or [E, in, out]) weights."""
    weight = weights[expert].T if transposed else weights[expert]
    return F.linear(x, weight, None if biases is None else biases[expert].to(x.dtype))

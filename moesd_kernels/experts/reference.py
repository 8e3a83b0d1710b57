"""The expert layer in PyTorch: the specification, and the portable back-end.

``fused_experts_reference`` is the definition: one pass per expert, everything in at least fp32,
and in fp64 when given fp64, which makes it the oracle of the tests. ``fused_experts_torch`` is what
runs where no compiled back-end does; it keeps the matrix products in the model's dtype. Quantised
weights are first read as numbers of that dtype, in both, an expert at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moesd_kernels.formats import dequantize, round_straight_through

from .spec import ExpertsSpec, ExpertsWeights, TopK
from .spec.activations import FUNCTIONS


def apply_activation(projected: Tensor, spec: ExpertsSpec) -> Tensor:
    """``act(gate) * up``, clamped by the limit; with alpha ``gate * σ(alpha * gate) * (up + 1)``.

    Args:
        projected: ``[N, 2I]`` gate and up projections, or ``[N, I]`` when not gated.
        spec: says where gate and up lie, and what is computed of them.

    Returns:
        ``[N, I]`` in the dtype of ``projected``.
    """
    if not spec.gated:
        return FUNCTIONS[spec.activation](projected)
    if spec.interleaved:
        gate, up = projected[..., ::2], projected[..., 1::2]
    else:
        gate, up = projected.chunk(2, dim=-1)
    limit, alpha = spec.activation_limit, spec.activation_alpha
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if alpha is not None:
        return gate * (alpha * gate).sigmoid() * (up + 1)
    return FUNCTIONS[spec.activation](gate) * up


def fused_experts_reference(
    x: Tensor,
    weights: ExpertsWeights,
    routing: TopK,
    spec: ExpertsSpec,
    out: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """``out[t] = sum_k routing.weights[t, k] * expert[routing.ids[t, k]](x[t])``.

    Arguments are those of ``moesd_kernels.fused_experts``, already checked. Computes in fp32,
    or fp64 for fp64 inputs, and rounds once at the end. Differentiable.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    weighted = wide.new_zeros(*routing.ids.shape, x.shape[1])  # [T, K, H]
    rounded, stored_in = _rounding(spec, x.dtype)
    wide = rounded(wide)
    for expert in range(weights.down.shape[0]):
        token, k = torch.where(routing.ids == expert)
        up_weight, down_weight = (w.to(dtype) for w in _matrices(weights, expert, spec, stored_in))
        projected = wide[token] @ up_weight.T
        if weights.gate_up_bias is not None:
            projected = projected + weights.gate_up_bias[expert].to(dtype)
        y = rounded(apply_activation(projected, spec)) @ down_weight.T
        if weights.down_bias is not None:
            y = y + weights.down_bias[expert].to(dtype)
        weighted = weighted.index_put((token, k), y * routing.weights[token, k, None].to(dtype))
    result = weighted.sum(dim=1).to(x.dtype)
    return result if out is None else out.copy_(result)


def fused_experts_torch(
    x: Tensor,
    weights: ExpertsWeights,
    routing: TopK,
    spec: ExpertsSpec,
    out: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """The same sum with matrix products in the model's dtype, over the active experts only.

    Pairs are sorted by expert once, so an expert's rows are one slice. The activation and the
    weighted sum are in fp32. Reads the expert counts on the host: on a GPU this waits for the
    device and cannot be captured in a graph. Differentiable.

    With ``batch_invariant`` every pair is a product of its own, so that its shape, and with it the
    order of summation, never depends on the other rows. Slow; the compiled back-ends do better.
    """
    (T, K), E, H = routing.ids.shape, weights.down.shape[0], x.shape[1]
    pair_ids = routing.ids.reshape(-1).to(torch.int64)
    valid = (pair_ids >= 0) & (pair_ids < E)
    order = torch.where(valid, pair_ids, E).argsort(stable=True)  # [N], dropped pairs last
    counts = torch.bincount(pair_ids[valid], minlength=E).tolist()
    own, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    rounded, stored_in = _rounding(spec, own)
    x = rounded(x.to(stored_in))
    biases = weights.gate_up_bias, weights.down_bias
    pieces = []
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = order[start : start + count]
        start += count
        gate_up, down = _matrices(weights, expert, spec, stored_in)
        gate_up_bias, down_bias = (b if b is None else b[expert].to(stored_in) for b in biases)
        for part in rows.split(1 if batch_invariant else count):
            projected = F.linear(x[part // K], gate_up, gate_up_bias)
            active = rounded(apply_activation(projected.to(dtype), spec)).to(stored_in)
            pieces.append(F.linear(active, down, down_bias))
    weighted = torch.zeros(T * K, H, dtype=dtype, device=x.device)
    if pieces:
        kept = order[:start]
        pair_weights = routing.weights.reshape(-1)[kept].to(dtype)
        weighted = weighted.index_put((kept,), torch.cat(pieces).to(dtype) * pair_weights[:, None])
    result = weighted.view(T, K, H).sum(dim=1).to(own)
    return result if out is None else out.copy_(result)


def _rounding(
    spec: ExpertsSpec, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], torch.dtype]:
    """What is done to activations before a product, and the dtype that weights are read in."""
    if not spec.rounds_activations:
        return lambda x: x, dtype
    wide = torch.promote_types(dtype, torch.float32)
    return lambda x: round_straight_through(x).to(x.dtype), wide


def _matrices(
    weights: ExpertsWeights, expert: int, spec: ExpertsSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One expert's two matrices, ``[2I, H]`` and ``[H, I]``, in ``dtype``."""
    scales = (s if s is None else s[expert] for s in (weights.gate_up_scale, weights.down_scale))
    matrices = weights.gate_up[expert], weights.down[expert]
    stored = zip(matrices, scales, spec.formats, strict=True)
    gate_up, down = (dequantize(w, scale, name, dtype) for w, scale, name in stored)
    return (gate_up.T, down.T) if spec.transposed else (gate_up, down)

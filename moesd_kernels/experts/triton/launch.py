"""Entry of the Triton back-end: arguments, and calls too large for one plan."""

from __future__ import annotations

import torch
from torch import Tensor

from moesd_kernels.experts.spec import ExpertsSpec, ExpertsWeights, TopK

from .combine_norm import After
from .layer import MAX_PAIRS, Layer
from .types import LayerTiles


def fused_experts_triton(
    x: Tensor,
    weights: ExpertsWeights,
    routing: TopK,
    spec: ExpertsSpec,
    out: Tensor | None = None,
    *,
    batch_invariant: bool = False,
    config: LayerTiles | None = None,
) -> Tensor:
    """``out[t] = sum_k routing.weights[t, k] * expert[routing.ids[t, k]](x[t])``.

    Arguments are those of ``moesd_kernels.fused_experts``, already checked. Weights are read
    where they lie; workspaces have static sizes, so a call can be captured in a CUDA graph.

    Args:
        config: replaces the selected configuration (tuning and tests).

    Returns:
        ``out``, or a new ``[T, H]`` tensor in ``x.dtype``.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    T, TOPK = routing.ids.shape
    if T == 0 or x.shape[1] == 0:
        return out
    if TOPK == 0:
        return out.zero_()
    layer = Layer(weights, spec)
    if x.stride(1) != 1:
        x = x.contiguous()
    target = out if out.stride(1) == 1 else torch.empty_like(x)
    step = max(1, MAX_PAIRS // TOPK)
    with _device_guard(x.device):
        for t in range(0, T, step):
            rows = slice(t, t + step)
            ids, pair_weights = routing.ids[rows].contiguous(), routing.weights[rows].contiguous()
            layer.run(x[rows], ids, pair_weights, target[rows], batch_invariant, config)
    return out if target is out else out.copy_(target)


def fused_experts_add_norm(
    x: Tensor,
    weights: ExpertsWeights,
    routing: TopK,
    spec: ExpertsSpec,
    after: After,
    *,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """``fused_experts_triton``, and in its last launch what follows it in a decoder layer.

    Args:
        x: ``[T, H]``, rows contiguous, T * K <= ``MAX_PAIRS``.

    Returns:
        ``after.stream`` with the block's output, and its norm, both ``[T, H]``.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x), torch.empty_like(x)
    with _device_guard(x.device):
        done = Layer(weights, spec).run(
            x, routing.ids, routing.weights, torch.empty_like(x), batch_invariant, None, after
        )
    assert done is not None
    return done


def _device_guard(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device if device.type == "cuda" else -1)

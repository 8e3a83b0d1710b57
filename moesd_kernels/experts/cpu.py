"""The C++ back-end on a CPU, ``csrc/cpu/ops/experts.cpp``: rows depend on themselves alone."""

from __future__ import annotations

import torch
from torch import Tensor

from moesd_kernels import library

from .spec import ExpertsSpec, ExpertsWeights, TopK


def unavailable_reason() -> str | None:
    """Why the kernels cannot run in this process, or None. Builds them if needed."""
    return library.load("cpu")


def fused_experts_cpu(
    x: Tensor,
    weights: ExpertsWeights,
    routing: TopK,
    spec: ExpertsSpec,
    out: Tensor | None = None,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """``sum_k weights[t, k] * expert[ids[t, k]](x[t])``, in the dtype of ``x``.

    Intermediates and the sum over k (in ascending order of expert id) are fp32; amx and
    avx512_bf16 round the activation to bf16. ``batch_invariant`` is always true of these kernels.

    Raises:
        ValueError: shapes do not fit together, or weights are not contiguous.
        TypeError: a dtype is not supported or does not match.
    """
    fits = out is not None and out.is_contiguous()
    result = out if fits else torch.empty_like(x, memory_format=torch.contiguous_format)
    assert result is not None
    torch.ops.moesd.experts(
        x,
        weights.gate_up,
        weights.down,
        routing.ids,
        routing.weights,
        weights.gate_up_bias,
        weights.down_bias,
        *spec.op_options,
        weights.gate_up_scale,
        weights.down_scale,
        result,
    )
    return result if fits or out is None else out.copy_(result)

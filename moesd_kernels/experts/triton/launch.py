"""Entry of the Triton back-end: arguments, and calls too large for one plan."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import ACTIVATIONS
from .layer import MAX_PAIRS, Layer
from .types import LayerTiles


def fused_experts_triton(
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
    config: LayerTiles | None = None,
) -> Tensor:
    """``out[t] = sum_k topk_weights[t, k] * expert[topk_ids[t, k]](hidden_states[t])``.

    Arguments are those of :func:`moesd_kernels.fused_experts`, already checked. Weights are read
    where they lie; workspaces have static sizes, so a call can be captured in a CUDA graph.

    Args:
        config: Replaces the selected configuration (tuning and tests).

    Returns:
        ``out``, or a new [T, H] tensor in ``hidden_states.dtype``.
    """
    if activation not in ACTIVATIONS:
        raise NotImplementedError(
            f"activation must be in {sorted(ACTIVATIONS)}, got {activation!r}"
        )
    if not gated and (activation_limit is not None or activation_alpha is not None):
        raise NotImplementedError("activation_limit and activation_alpha need gated=True")
    if out is None:
        out = torch.empty(
            hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device
        )
    T, TOPK = topk_ids.shape
    if T == 0 or hidden_states.shape[1] == 0:
        return out
    if TOPK == 0:
        return out.zero_()
    layer = Layer(
        w_gate_up,
        w_down,
        gate_up_bias,
        down_bias,
        ACTIVATIONS[activation],
        gated,
        interleaved,
        transposed,
        activation_limit,
        activation_alpha,
    )
    if hidden_states.stride(1) != 1:
        hidden_states = hidden_states.contiguous()
    target = out if out.stride(1) == 1 else torch.empty_like(hidden_states)
    step = max(1, MAX_PAIRS // TOPK)
    with _device_guard(hidden_states.device):
        for t in range(0, T, step):
            rows = slice(t, t + step)
            ids, weights = topk_ids[rows].contiguous(), topk_weights[rows].contiguous()
            layer.run(hidden_states[rows], ids, weights, target[rows], batch_invariant, config)
    return out if target is out else out.copy_(target)


def _device_guard(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device if device.type == "cuda" else -1)

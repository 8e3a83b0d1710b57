"""Checks on the arguments of ``fused_experts``; errors say what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int64, torch.int32)


def check_arguments(
    hidden_states: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    activation_limit: float | None,
    activation_alpha: float | None,
    out: Tensor | None,
) -> None:
    """Raise when the arguments of :func:`moesd_kernels.fused_experts` do not fit together.

    Values are not looked at: an id that is no expert contributes nothing, by contract.

    Raises:
        TypeError: A dtype is not supported, or differs from that of ``hidden_states``.
        ValueError: A rank, size or device does not match, or options exclude each other.
    """
    _check_dtypes(hidden_states, w_gate_up, w_down, topk_ids, topk_weights)
    _check_shapes(hidden_states, w_gate_up, w_down, topk_ids, topk_weights, gated, transposed)
    E, H, width = _expert_sizes(w_down, gated, transposed)
    if gate_up_bias is not None:
        _check_bias("gate_up_bias", gate_up_bias, (E, width), hidden_states)
    if down_bias is not None:
        _check_bias("down_bias", down_bias, (E, H), hidden_states)
    if not gated and (interleaved or activation_limit is not None or activation_alpha is not None):
        raise ValueError(
            "interleaved, activation_limit and activation_alpha need gated=True, got gated=False, "
            f"{interleaved=}, {activation_limit=}, {activation_alpha=}"
        )
    if out is not None:
        _check_out(out, hidden_states)


def _expert_sizes(w_down: Tensor, gated: bool, transposed: bool) -> tuple[int, int, int]:
    """E, H, and the width of the first projection: 2I when gated, I otherwise."""
    E, H, I = w_down.shape
    if transposed:
        H, I = I, H
    return E, H, 2 * I if gated else I


def _check_dtypes(
    hidden_states: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> None:
    dtype = hidden_states.dtype
    if dtype not in FLOATS:
        raise TypeError(f"hidden_states must be bfloat16, float16 or float32, got {dtype}")
    if w_gate_up.dtype != dtype or w_down.dtype != dtype:
        raise TypeError(
            f"weights must have the dtype of hidden_states, {dtype}, "
            f"got w_gate_up {w_gate_up.dtype} and w_down {w_down.dtype}"
        )
    if topk_ids.dtype not in IDS:
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_weights.dtype not in FLOATS:
        raise TypeError(
            f"topk_weights must be float32, bfloat16 or float16, got {topk_weights.dtype}"
        )
    device = hidden_states.device
    for name, tensor in (
        ("w_gate_up", w_gate_up),
        ("w_down", w_down),
        ("topk_ids", topk_ids),
        ("topk_weights", topk_weights),
    ):
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like hidden_states, got {tensor.device}")


def _check_shapes(
    hidden_states: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gated: bool,
    transposed: bool,
) -> None:
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states must be [T, H], got shape {tuple(hidden_states.shape)}")
    if w_down.dim() != 3:
        layout = "[E, I, H]" if transposed else "[E, H, I]"
        raise ValueError(f"w_down must be {layout}, got shape {tuple(w_down.shape)}")
    T, hidden = hidden_states.shape
    E, H, width = _expert_sizes(w_down, gated, transposed)
    if hidden != H:
        raise ValueError(
            f"w_down has H = {H} (shape {tuple(w_down.shape)}, {transposed=}), "
            f"but hidden_states is {tuple(hidden_states.shape)}"
        )
    expected = (E, H, width) if transposed else (E, width, H)
    if tuple(w_gate_up.shape) != expected:
        raise ValueError(
            f"w_gate_up must be {expected} for w_down {tuple(w_down.shape)} with {gated=}, "
            f"{transposed=}, got {tuple(w_gate_up.shape)}"
        )
    if topk_ids.dim() != 2 or topk_ids.shape[0] != T:
        raise ValueError(f"topk_ids must be [T, K] with T = {T}, got {tuple(topk_ids.shape)}")
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"topk_weights must have the shape of topk_ids, {tuple(topk_ids.shape)}, "
            f"got {tuple(topk_weights.shape)}"
        )


def _check_bias(name: str, bias: Tensor, shape: tuple[int, int], like: Tensor) -> None:
    if tuple(bias.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(bias.shape)}")
    if bias.dtype != like.dtype:
        raise TypeError(f"{name} must have dtype {like.dtype}, got {bias.dtype}")
    if bias.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {bias.device}")


def _check_out(out: Tensor, like: Tensor) -> None:
    if out.shape != like.shape or out.dtype != like.dtype or out.device != like.device:
        raise ValueError(
            f"out must be {tuple(like.shape)} {like.dtype} on {like.device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )

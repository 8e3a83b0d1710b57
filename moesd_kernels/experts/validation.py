"""Checks on the arguments of ``fused_experts``; errors say what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS, check_weight

from .spec import ExpertsSpec, ExpertsWeights, TopK

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int64, torch.int32)


def check_arguments(
    x: Tensor, weights: ExpertsWeights, routing: TopK, spec: ExpertsSpec, out: Tensor | None
) -> None:
    """Raise when the arguments of ``moesd_kernels.fused_experts`` do not fit together.

    Values are not looked at: an id that is no expert contributes nothing, by contract.

    Raises:
        TypeError: a dtype is not supported, or differs from that of ``hidden_states``.
        ValueError: a rank, size or device does not match.
    """
    _check_dtypes(x, weights, routing, spec)
    _check_shapes(x, weights, routing, spec)
    E, H, width = _expert_sizes(weights.down, spec)
    _check_stored(weights, spec, (E, H, width))
    if weights.gate_up_bias is not None:
        _check_bias("gate_up_bias", weights.gate_up_bias, (E, width), x)
    if weights.down_bias is not None:
        _check_bias("down_bias", weights.down_bias, (E, H), x)
    if out is not None:
        _check_out(out, x)


def _expert_sizes(w_down: Tensor, spec: ExpertsSpec) -> tuple[int, int, int]:
    """E, H, and the width of the first projection: 2I when gated, I otherwise."""
    E, H, I = *w_down.shape[:2], WEIGHT_FORMATS[spec.formats[1]].depth(w_down)
    if spec.transposed:
        H, I = I, H
    return E, H, 2 * I if spec.gated else I


def _check_dtypes(x: Tensor, weights: ExpertsWeights, routing: TopK, spec: ExpertsSpec) -> None:
    dtype = x.dtype
    if dtype not in FLOATS:
        raise TypeError(f"hidden_states must be bfloat16, float16 or float32, got {dtype}")
    plain = [w for w, name in zip(weights, spec.formats, strict=False) if name == "plain"]
    if any(weight is not None and weight.dtype != dtype for weight in plain):
        raise TypeError(
            f"weights must have the dtype of hidden_states, {dtype}, "
            f"got w_gate_up {weights.gate_up.dtype} and w_down {weights.down.dtype}"
        )
    if routing.ids.dtype not in IDS:
        raise TypeError(f"topk_ids must be int32 or int64, got {routing.ids.dtype}")
    if routing.weights.dtype not in FLOATS:
        raise TypeError(
            f"topk_weights must be float32, bfloat16 or float16, got {routing.weights.dtype}"
        )
    for name, tensor in (
        ("w_gate_up", weights.gate_up),
        ("w_down", weights.down),
        ("topk_ids", routing.ids),
        ("topk_weights", routing.weights),
    ):
        if tensor.device != x.device:
            raise ValueError(
                f"{name} must be on {x.device} like hidden_states, got {tensor.device}"
            )


def _check_shapes(x: Tensor, weights: ExpertsWeights, routing: TopK, spec: ExpertsSpec) -> None:
    if x.dim() != 2:
        raise ValueError(f"hidden_states must be [T, H], got shape {tuple(x.shape)}")
    down, gate_up = tuple(weights.down.shape), tuple(weights.gate_up.shape)
    gated, transposed = spec.gated, spec.transposed
    if len(down) != 3:
        layout = "[E, I, H]" if transposed else "[E, H, I]"
        raise ValueError(f"w_down must be {layout}, got shape {down}")
    T, hidden = x.shape
    E, H, width = _expert_sizes(weights.down, spec)
    if hidden != H:
        raise ValueError(
            f"w_down has H = {H} (shape {down}, {transposed=}), "
            f"but hidden_states is {tuple(x.shape)}"
        )
    expected = (E, H, width) if transposed else (E, width, H)
    if spec.weight_format == "plain" and gate_up != expected:
        raise ValueError(
            f"w_gate_up must be {expected} for w_down {down} with {gated=}, {transposed=}, "
            f"got {gate_up}"
        )
    ids, topk_weights = tuple(routing.ids.shape), tuple(routing.weights.shape)
    if len(ids) != 2 or ids[0] != T:
        raise ValueError(f"topk_ids must be [T, K] with T = {T}, got {ids}")
    if topk_weights != ids:
        raise ValueError(f"topk_weights must have the shape of topk_ids, {ids}, got {topk_weights}")


def _check_stored(weights: ExpertsWeights, spec: ExpertsSpec, sizes: tuple[int, int, int]) -> None:
    """Raise unless both weights and their scales are what their formats say."""
    E, H, width = sizes
    I = width // 2 if spec.gated else width
    up_format, down_format = (WEIGHT_FORMATS[name] for name in spec.formats)
    gate_up, down = ((E, H, width), (E, I, H)) if spec.transposed else ((E, width, H), (E, H, I))
    check_weight("w_down", weights.down, weights.down_scale, down_format, down)
    check_weight("w_gate_up", weights.gate_up, weights.gate_up_scale, up_format, gate_up)


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

"""The machine description measured with our own kernels: what the models are predicted from."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.layer import Layer, make_layer
from bench.shapes import Shape
from bench.timer import CacheFlusher, seconds_of
from decoder.perf_model.machine import Machine, RowCurve
from decoder.perf_model.measure_machine import Linear, measure_machine
from moesd_kernels import cpu_ops, fused_experts

ROWS = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 9
CURVE_SHAPE = Shape(32, 4, 512, 512)


def machine_with_kernels(
    device: torch.device | str, dtype: torch.dtype, shape: Shape = CURVE_SHAPE
) -> Machine:
    """``measure_machine`` with the linear and expert operations that the decoder runs.

    Args:
        shape: layer on which the expert kernel's row curve is taken.
    """
    device = torch.device(device)
    ours = device.type == "cpu" and cpu_ops.unavailable() is None
    linear: Linear = cpu_ops.linear if ours else torch.nn.functional.linear
    curve = expert_curve(shape, dtype, device)
    return measure_machine(device, dtype, linear=linear, expert_curve=curve)


def expert_curve(shape: Shape, dtype: torch.dtype, device: torch.device) -> RowCurve:
    """Seconds per weight parameter of the expert kernel with 1, 2, 4 … rows per expert, cold."""
    layer = make_layer(shape, dtype, device, seed=0)
    flush = CacheFlusher(device)
    parameters = 3 * shape.E * shape.H * shape.I
    calls = []
    for rows in ROWS:
        ids = torch.arange(shape.E, device=device).repeat(rows)[:, None]  # [rows * E, 1]
        hidden = torch.randn(len(ids), shape.H, device=device).to(dtype)
        weights = torch.ones(len(ids), 1, device=device)
        calls.append(partial(_call, layer, hidden, ids, weights))
    # Passes over all rows, and the fastest of each: a machine that stalls does so for a while, and
    # a curve bent by it would describe nothing.
    passes = []
    for _ in range(REPEATS):
        times = []
        for call in calls:
            flush()
            times.append(seconds_of(call, device)[0])
        passes.append(times)
    seconds = [min(times) / parameters for times in zip(*passes, strict=True)]
    return RowCurve(tuple(map(float, ROWS)), tuple(seconds))


def _call(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    with torch.inference_mode():
        return fused_experts(hidden, layer.w_gate_up, layer.w_down, ids, weights)

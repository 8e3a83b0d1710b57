"""The machine description measured with our own kernels: what the models are predicted from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bench.measure.graph import MIN_STACK, CapturedStack
from bench.measure.timer import CacheFlusher, seconds_of
from bench.workloads.layer import Batch, Layer, make_layer
from bench.workloads.shapes import Shape
from decoder.perf_model.hardware.machine import Machine, RowCurve
from decoder.perf_model.hardware.measure_machine import Linear, measure_machine
from moesd_kernels import fused_experts
from moesd_kernels.dense import ops

ROWS = (1, 2, 4, 8, 16, 32, 64)
REPEATS = 9
# Weights of a layer are many times the cache, and on a GPU a call many times a launch.
CURVE_SHAPES = {"cpu": Shape(32, 4, 512, 512), "cuda": Shape(32, 4, 2048, 1024)}


def machine_with_kernels(device: torch.device | str, dtype: torch.dtype) -> Machine:
    """``measure_machine`` with the linear and expert operations that the decoder runs."""
    device = torch.device(device)
    ours = device.type == "cpu" and ops.unavailable() is None
    linear: Linear = ops.linear if ours else torch.nn.functional.linear
    curve = expert_curve(CURVE_SHAPES[device.type], dtype, device)
    return measure_machine(device, dtype, linear=linear, expert_curve=curve)


def expert_curve(shape: Shape, dtype: torch.dtype, device: torch.device) -> RowCurve:
    """Seconds per weight parameter of the expert kernel with 1, 2, 4 … rows per expert, cold."""
    batches = [_batch(shape, rows, dtype, device) for rows in ROWS]
    measure = seconds_in_graphs if device.type == "cuda" else _seconds_of_calls
    parameters = 3 * shape.E * shape.H * shape.I
    seconds = [s / parameters for s in measure(shape, dtype, device, batches)]
    return RowCurve(tuple(map(float, ROWS)), tuple(seconds))


def seconds_in_graphs(
    shape: Shape, dtype: torch.dtype, device: torch.device, batches: Sequence[Batch]
) -> list[float]:
    """Fastest seconds of a layer on each batch, captured."""
    layers = [make_layer(shape, dtype, device, seed) for seed in range(MIN_STACK)]
    seconds = []
    for batch in batches:
        stack = CapturedStack(_call, layers, batch)
        seconds.append(min(stack.seconds([batch] * len(layers)) for _ in range(REPEATS)))
    return seconds


def _seconds_of_calls(
    shape: Shape, dtype: torch.dtype, device: torch.device, batches: Sequence[Batch]
) -> list[float]:
    """Fastest seconds of a cold call on each batch."""
    layer = make_layer(shape, dtype, device, seed=0)
    flush = CacheFlusher(device)
    calls = [partial(_call, layer, b.hidden, b.topk_ids, b.topk_weights) for b in batches]
    # Passes over all rows, and the fastest of each: a machine that stalls does so for a while, and
    # a curve bent by it would describe nothing.
    passes = []
    for _ in range(REPEATS):
        times = []
        for call in calls:
            flush()
            times.append(seconds_of(call, device)[0])
        passes.append(times)
    return [min(times) for times in zip(*passes, strict=True)]


def _batch(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Batch:
    """``rows`` tokens for each expert, each token on one expert."""
    ids = torch.arange(shape.E, device=device).repeat(rows)[:, None]  # [rows * E, 1]
    hidden = torch.randn(len(ids), shape.H, device=device).to(dtype)
    return Batch(hidden, ids, torch.ones(len(ids), 1, device=device), shape.E)


def _call(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    with torch.inference_mode():
        return fused_experts(hidden, layer.w_gate_up, layer.w_down, ids, weights)

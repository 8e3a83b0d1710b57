"""Tiles measured on this GPU: for a layer and number of tokens, the fastest of a few candidates.

For every layer and number of tokens the model's choice and the hand-picked ones of
``bench.runs.tiles`` are timed in CUDA graphs over rotated weights: first gate_up's tiles and the
height of a block, then down's, then whether gate_up finds its rows by itself; at T = 1 the
one-token forms'. A candidate that changes the result beyond rounding is dropped.
Not run on a GPU yet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure.graph import CapturedStack, stack_size
from bench.measure.timer import seconds_of
from bench.runs import tiles
from bench.runs.tiles_file import write_entry
from bench.workloads.layer import Batch, Layer, make_batch, make_layer
from bench.workloads.routing import DEFAULT_UNION_RATIO
from bench.workloads.shapes import Shape
from moesd_kernels.experts.spec import DEFAULT_SPEC, ExpertsWeights, TopK
from moesd_kernels.experts.triton.config import Gemm, bucket, model_choice
from moesd_kernels.experts.triton.tuned import FOLDER, config_path, entry_of
from moesd_kernels.experts.triton.types import Device, LayerShape, LayerTiles

CANDIDATES = 16
ROUNDS = 15
BUDGET_S = 480.0
DISTINCT_BATCHES = 8
# Results of two tilings differ by the order of fp32 sums and one rounding to the output's dtype.
ROUNDINGS = 4.0

# What changes in one step of the search: the best so far -> configurations to try.
Step = Callable[[LayerTiles], list[LayerTiles]]


def tune_shape(
    shape: Shape,
    tokens: Sequence[int],
    dtype: torch.dtype,
    *,
    candidates: int = CANDIDATES,
    rounds: int = ROUNDS,
    budget_s: float = BUDGET_S,
    folder: Path = FOLDER,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """Tune a shape on a device and write the results as ``<folder>/<device>.json``.

    Prints nothing. ``moesd_kernels.experts.triton.tuned.use_folder`` makes the selector read
    the file.

    Args:
        shape: the layer; several sets of its weights are made.
        tokens: values of T, best the largest of its bucket each.
        dtype: bf16 or fp16.
        candidates: how many of the list to try in each step, the first ones.
        rounds: timed replays of each.
        budget_s: seconds after which no further T is begun and no further candidate tried.
        folder: any folder; made if it is missing.
        device: the current CUDA device by default. A CPU's interpreted kernels show that all of
            this works and nothing else: their file would name the device they stand in for.

    Returns:
        For each T that was reached: T, micros (of the best configuration, per layer), model_micros
        (of the model's choice), config (a ``LayerTiles``) and dropped (what failed, in words).
    """
    return list(tune_each(shape, tokens, dtype, candidates, rounds, budget_s, folder, device))


def tune_each(
    shape: Shape,
    tokens: Sequence[int],
    dtype: torch.dtype,
    candidates: int,
    rounds: int,
    budget_s: float,
    folder: Path,
    torch_device: torch.device | None = None,
) -> Iterator[dict[str, Any]]:
    """The results of ``tune_shape`` one by one, each already written."""
    from moesd_kernels.experts.triton.device import device_of

    end = time.perf_counter() + budget_s
    torch_device = torch_device or torch.device("cuda", torch.cuda.current_device())
    device = device_of(torch_device)
    bench = _Bench(shape, dtype, rounds, torch_device) if tokens else None
    for number, T in enumerate(tokens):
        # What earlier buckets did not use goes to those that are left.
        share = (end - time.perf_counter()) / (len(tokens) - number)
        if share <= 0 or bench is None:
            return
        layer = LayerShape(*shape, T)
        result = _tune_tokens(bench, layer, device, candidates, share)
        entry = entry_of(layer, str(dtype), bucket(layer), result["config"])
        write_entry(config_path(device.name, folder), device.name, entry)
        yield result


def search_steps(
    shape: LayerShape, dtype: torch.dtype, device: Device, limit: int
) -> list[tuple[str, Step]]:
    """Names and candidates of the search's steps, in order."""
    if shape.T == 1:
        steps: list[tuple[str, Step]] = [
            ("single_gate_up", tiles.single_gate_up_choices),
            ("single_down", tiles.single_down_choices),
        ]
    else:
        gate_up, down = _gemms(shape, dtype.itemsize)
        steps = [
            ("gate_up", lambda best: tiles.gate_up_choices(shape, gate_up, best, device)),
            ("down", lambda best: tiles.down_choices(down, best, device)),
            ("inline_pairs", lambda best: tiles.inline_choices(shape, best)),
        ]
    return [(name, partial(_first, step, limit)) for name, step in steps]


def _first(step: Step, limit: int, best: LayerTiles) -> list[LayerTiles]:
    """The first ``limit`` candidates of a step that are not the best so far itself."""
    return [config for config in step(best) if config != best][:limit]


def _gemms(shape: LayerShape, itemsize: int) -> tuple[Gemm, Gemm]:
    """gate_up and down as the model sees them, with the expected number of active experts."""
    active = shape.E * (1.0 - (1.0 - shape.K / shape.E) ** shape.T)
    rows = shape.T * shape.K / active
    return (
        Gemm(active, rows, shape.I, shape.H, 2, itemsize, False),
        Gemm(active, rows, shape.H, shape.I, 1, itemsize, True),
    )


class _Bench:
    """One shape's weights and inputs, and the time of a configuration on them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, rounds: int, device: torch.device) -> None:
        stack = stack_size(shape.E * shape.expert_bytes(dtype.itemsize))
        self.shape, self.dtype, self.rounds, self.device = shape, dtype, rounds, device
        self.layers = [make_layer(shape, dtype, device, seed) for seed in range(stack)]

    def batches(self, T: int) -> list[Batch]:
        """Inputs of T tokens with different routings."""
        return [
            make_batch(
                self.shape, T, 1, "uniform", self.dtype, self.device, seed, DEFAULT_UNION_RATIO
            )
            for seed in range(DISTINCT_BATCHES)
        ]

    def output(self, batch: Batch, config: LayerTiles) -> Tensor:
        """The first layer's result."""
        return _caller(config)(self.layers[0], batch.hidden, batch.topk_ids, batch.topk_weights)

    def seconds(self, batches: list[Batch], config: LayerTiles) -> float:
        """Median seconds of a layer: in graphs, and interpreted simply as long as it takes."""
        if self.device.type == "cpu":
            calls = (partial(self.output, batch, config) for batch in batches[: self.rounds])
            return statistics.median(seconds_of(call, self.device)[0] for call in calls)
        captured = CapturedStack(_caller(config), self.layers, batches[0])
        count = len(self.layers)
        turns = [[batches[(r + i) % len(batches)] for i in range(count)] for r in range(9)]
        times = [captured.seconds(turns[r % len(turns)]) for r in range(self.rounds)]
        return statistics.median(times)


def _caller(config: LayerTiles) -> Callable[[Layer, Tensor, Tensor, Tensor], Tensor]:
    from moesd_kernels.experts.triton.launch import fused_experts_triton

    return lambda layer, hidden, ids, weights: fused_experts_triton(
        hidden,
        ExpertsWeights(layer.w_gate_up, layer.w_down),
        TopK(ids, weights),
        DEFAULT_SPEC,
        config=config,
    )


def _tune_tokens(
    bench: _Bench, shape: LayerShape, device: Device, limit: int, budget_s: float
) -> dict[str, Any]:
    """One result of ``tune_shape``."""
    end = time.perf_counter() + budget_s
    batches = bench.batches(shape.T)
    best = model_choice(shape, bench.dtype, device)
    expected = bench.output(batches[0], best).float()
    first = fastest = bench.seconds(batches, best)
    dropped = []
    steps = search_steps(shape, bench.dtype, device, limit)
    for number, (name, step) in enumerate(steps):
        stop = time.perf_counter() + (end - time.perf_counter()) / (len(steps) - number)
        for config in step(best):
            if time.perf_counter() > stop:
                break
            what = f"{name} {getattr(config, name)}"
            try:
                if not close(bench.output(batches[0], config).float(), expected, bench.dtype):
                    dropped.append(f"wrong result: {what}")
                    continue
                seconds = bench.seconds(batches, config)
            except Exception as error:  # whatever a compiler or launch refuses is no candidate
                dropped.append(f"{type(error).__name__}: {what}")
                continue
            if seconds < fastest:
                best, fastest = config, seconds
    return {
        "T": shape.T,
        "micros": 1e6 * fastest,
        "model_micros": 1e6 * first,
        "config": best,
        "dropped": dropped,
    }


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether every element is within a few roundings of its row's scale."""
    scale = expected.abs().amax(dim=-1, keepdim=True)
    bound = ROUNDINGS * torch.finfo(dtype).eps * scale
    return bool(((got - expected).abs() <= bound).all())

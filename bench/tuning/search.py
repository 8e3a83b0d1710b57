"""Tiles measured on this GPU: for a layer and number of tokens, the fastest of a few candidates.

For every layer and number of tokens the model's choice and the hand-picked ones (``candidates.py``)
are timed in CUDA graphs over rotated weights: first gate_up's tiles and the height of a block, then
down's, both after a plan; then whether gate_up finds its rows by itself; at T = 1 the one-token
forms'. A candidate that changes the result beyond rounding is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.workloads.shapes import Shape
from moesd_kernels.experts.triton.config import model_choice
from moesd_kernels.experts.triton.tuned import FOLDER, config_path, entry_of
from moesd_kernels.experts.triton.types import Device, LayerShape, LayerTiles

from .candidates import (
    down_choices,
    gate_up_choices,
    gemms,
    heights,
    inline_choices,
    single_down_choices,
    single_gate_up_choices,
)
from .compiling import Job
from .table import write_entry
from .timing import TilesBench, close

CANDIDATES = 16
ROUNDS = 15
BUDGET_S = 480.0

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
) -> Iterator[dict[str, Any]]:
    """Tune a shape on a device; each result is written to ``<folder>/<device>.json`` at once.

    Prints nothing. ``moesd_kernels.experts.triton.tuned.use_folder`` makes the selector read
    the file. Compiling ``candidate_jobs`` beforehand saves most of the time.

    Args:
        shape: the layer; several sets of its weights are made.
        tokens: values of T; an entry serves those up to half and twice as many.
        dtype: bf16 or fp16.
        candidates: how many of the list to try in each step, the first ones.
        rounds: timed replays of each.
        budget_s: seconds after which no further T is begun and no further candidate tried.
        folder: any folder; made if it is missing.
        device: the current CUDA device by default. A CPU's interpreted kernels show that all of
            this works and nothing else: their file would name the device they stand in for.

    Yields:
        For each T that was reached: T, micros (of the best configuration, per layer), model_micros
        (of the model's choice), config (a ``LayerTiles``) and dropped (what failed, in words).
    """
    from moesd_kernels.experts.triton.device import device_of

    end = time.perf_counter() + budget_s
    torch_device = device or torch.device("cuda", torch.cuda.current_device())
    described = device_of(torch_device)
    bench = TilesBench(shape, dtype, rounds, torch_device)
    for number, T in enumerate(tokens):
        # What earlier buckets did not use goes to those that are left.
        share = (end - time.perf_counter()) / (len(tokens) - number)
        if share <= 0:
            return
        layer = LayerShape(*shape, T)
        result = _tune_tokens(bench, layer, described, candidates, share)
        entry = entry_of(layer, str(dtype), result["config"])
        write_entry(config_path(described.name, folder), described.name, entry)
        yield result


def candidate_jobs(
    shape: Shape, tokens: Sequence[int], dtype: torch.dtype, device: Device, limit: int
) -> dict[Any, Job]:
    """Layer calls that compile every candidate of ``tune_shape``, whichever turn out best.

    Kernels are compiled for K and whether E is a multiple of 16, not for other sizes of a layer:
    the keys are equal where the kernels are.
    """
    jobs: dict[Any, Job] = {}
    kind = shape.K, shape.E % 16 == 0, str(dtype)

    for T in tokens:
        layer = LayerShape(*shape, T)
        start = _start(layer, dtype, device)
        jobs[(*kind, T)] = Job(shape, T, start)  # its plan, too, whose size depends on T
        steps = [x for x in search_steps(layer, dtype, device, limit) if x[0] != "inline_pairs"]
        for name, step in steps:
            tried = heights(layer) if name == "down" else [start.block_m]
            for height in tried:
                for config in step(start.with_block_m(height)):
                    tile = getattr(config, name)
                    key = (*kind, name, tile and replace(tile, group_m=1))
                    jobs.setdefault(key, Job(shape, T, config))
    return jobs


def _start(shape: LayerShape, dtype: torch.dtype, device: Device) -> LayerTiles:
    """The model's choice, with a plan of its own: its kernels are then the same at every T."""
    return replace(model_choice(shape, dtype, device), inline_pairs=0)


def search_steps(
    shape: LayerShape, dtype: torch.dtype, device: Device, limit: int
) -> list[tuple[str, Step]]:
    """Names and candidates of the search's steps, in order."""
    if shape.T == 1:
        steps: list[tuple[str, Step]] = [
            ("single_gate_up", single_gate_up_choices),
            ("single_down", single_down_choices),
        ]
    else:
        gate_up, down = gemms(shape, dtype.itemsize)
        steps = [
            ("gate_up", lambda best: gate_up_choices(shape, gate_up, best, device)),
            ("down", lambda best: down_choices(down, best, device)),
            ("inline_pairs", lambda best: inline_choices(shape, best)),
        ]
    return [(name, partial(_first, step, limit)) for name, step in steps]


def _first(step: Step, limit: int, best: LayerTiles) -> list[LayerTiles]:
    """The first ``limit`` candidates of a step that are not the best so far itself."""
    return [config for config in step(best) if config != best][:limit]


def _tune_tokens(
    bench: TilesBench, shape: LayerShape, device: Device, limit: int, budget_s: float
) -> dict[str, Any]:
    """One result of ``tune_shape``."""
    end = time.perf_counter() + budget_s
    batches = bench.batches(shape.T)
    model = model_choice(shape, bench.dtype, device)
    best = model if shape.T == 1 else _start(shape, bench.dtype, device)
    expected = bench.output(batches[0], model).float()
    first, fastest = (bench.seconds(batches, config) for config in (model, best))
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
    if first <= fastest:
        best, fastest = model, first
    return {
        "T": shape.T,
        "micros": 1e6 * fastest,
        "model_micros": 1e6 * first,
        "config": best,
        "dropped": dropped,
    }

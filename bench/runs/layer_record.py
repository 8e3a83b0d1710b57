"""The layer measurement's settings, and the line that a point of it becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measure.ceilings import Ceilings
from bench.measure.timer import summarize
from bench.workloads.layer import floor_seconds, layer_bytes
from bench.workloads.shapes import Shape
from bench.workloads.stored import formats_of
from moesd_kernels.formats import GROUPS, WEIGHT_FORMATS

_ENDLESS = 1 << 20  # weights of a group, where a whole row has one scale: next to no bytes


@dataclass(frozen=True, slots=True)
class Settings:
    """What stays the same over all points of a run.

    Attributes:
        weight_format: of our weights; others are given the numbers these stand for, and so are we,
            as the variant ``plain``.
        group: weights of a row that share a scale in int8 and int4; None for all of them.
        graph: time CUDA graphs of a stack of layers instead of single calls.
        peers: names of transformers' implementations.
        fused_moe_source: folder with vLLM's ``fused_moe.py`` and ``configs/``; needs ``graph``,
            since the host's time around that kernel would not be vLLM's.
    """

    dtype: torch.dtype
    device: torch.device
    routing: str
    union_ratio: float
    rounds: int
    budget_s: float
    backend: str
    batch_invariant: bool
    graph: bool
    peers: Sequence[str]
    fused_moe_source: Path | None = None
    weight_format: str = "plain"
    group: int | None = GROUPS[0]

    @property
    def weight_bytes(self) -> float:
        """Bytes of one of our weights, its share of the scales included."""
        group = self.group or _ENDLESS
        first, second = (
            WEIGHT_FORMATS[name].bits(group, plain_bits=8 * self.dtype.itemsize)
            for name in formats_of(self.weight_format)
        )
        return (2 * first + second) / 3 / 8  # gate and up have twice the weights of down

    def __post_init__(self) -> None:
        if self.fused_moe_source and not self.graph:
            raise ValueError("fused_moe_source is timed in CUDA graphs only: on a GPU, not eagerly")


@dataclass(frozen=True, slots=True)
class Samples:
    """What the rounds of one point gave.

    Attributes:
        seconds: variant -> seconds of a layer, round by round; ``moesd`` is ours.
        distinct: mean distinct experts of a layer, round by round.
        rates: ``read`` (bytes/s) and ``peak`` (operations/s) taken in the same rounds; without
            them the ceilings stand in.
        launches: kernel -> seconds of a call.
        remarks: what was not timed as asked for, and why; fields of the line.
    """

    seconds: dict[str, list[float]]
    distinct: list[float]
    rates: dict[str, list[float]]
    launches: dict[str, float]
    remarks: dict[str, dict[str, Any]]


def layer_fields(
    shape: Shape, batch: int, rows: int, settings: Settings, ceilings: Ceilings, samples: Samples
) -> dict[str, Any]:
    """The fields of a ``kernel`` line: ``batch`` sequences of ``rows`` tokens each."""
    tokens, itemsize = batch * rows, settings.dtype.itemsize
    dtype = str(settings.dtype).removeprefix("torch.")
    count = len(samples.distinct)
    reads = samples.rates.get("read") or [ceilings.read] * count
    peaks = samples.rates.get("peak") or [ceilings.peak[dtype]] * count
    floors = [
        floor_seconds(shape, tokens, *round_, itemsize, settings.weight_bytes)
        for round_ in zip(samples.distinct, reads, peaks, strict=True)
    ]
    distinct = sum(samples.distinct) / count
    moved = layer_bytes(shape, tokens, distinct, itemsize, settings.weight_bytes)
    ours = samples.seconds["moesd"]
    correlated = settings.routing == "correlated"
    return {
        "shape": list(shape),
        "dtype": dtype,
        "weight_format": settings.weight_format,
        "group": settings.group,
        "routing": settings.routing,
        "union_ratio": settings.union_ratio if correlated else None,
        "backend": settings.backend,
        "batch_invariant": settings.batch_invariant,
        "graph": settings.graph,
        **samples.remarks,
        "B": batch,
        "gamma": rows - 1,
        "T": tokens,
        "distinct": distinct,
        "bytes": moved,
        "floor_s": summarize(floors).median,
        "of_roof": summarize([f / s for f, s in zip(floors, ours, strict=True)]).median,
        "gb_per_s": moved / summarize(ours).median / 1e9,
        "read_bandwidth": summarize(reads).median,
        "peak": summarize(peaks).median,
        "seconds": {name: summarize(s).as_dict() for name, s in samples.seconds.items()},
        "launches_s": samples.launches,
        "ratio": {
            # A slow peer was timed once.
            name: summarize([a / b for a, b in zip(s, ours, strict=False)]).median
            for name, s in samples.seconds.items()
            if name != "moesd"
        },
    }


def efficiency(times: dict[tuple[int, int], float], batch: int, rows: int) -> float:
    """Target efficiency T(B, 1) / T(B, rows); NaN when T(B, 1) was not measured."""
    base = times.get((batch, 1))
    return base / times[batch, rows] if base else math.nan

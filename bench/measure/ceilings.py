"""The two ceilings every time is held against: pure read bandwidth and peak multiply-add rate.

Measured through operations that do nothing else, by the best of several of them: a ceiling measured
too low would flatter every kernel below it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.measure.timer import seconds_of
from decoder.perf_model.hardware.gpu_timer import best_seconds

READ_BYTES = {"cpu": 2**29, "cuda": 2**30}  # halves of it are several times an L2 cache
PROBE_BYTES = 2**28
# From this rate on (FLOP/s) a CPU needs a larger product to show its peak.
CPU_SQUARE, FAST_CPU, FAST_SQUARE = 2048, 5e11, 4096
# Sides of the products that show the peak, each with the rate from which it is worth its time:
# without 16-bit instructions a 16-bit product takes seconds at full size.
SQUARES = {
    "cpu": ((256, 0.0), (CPU_SQUARE, 2e10), (FAST_SQUARE, FAST_CPU)),
    "cuda": ((256, 0.0), (8192, 0.0)),
}
ROW = 2048
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Ceilings:
    """bytes/s of a pure read, bytes/s of a copy (read plus write), FLOP/s by dtype name."""

    read: float
    copy: float
    peak: dict[str, float]


def measure_ceilings(device: torch.device) -> Ceilings:
    """Best of ``ROUNDS`` for each operation; about 3 s on two CPU cores.

    On a GPU each is timed in a CUDA graph.

    On a CPU the peak of a 16-bit type is the best of its own matrix product and of fp32's: where
    there are no 16-bit instructions, widening to fp32 is what a perfect kernel would do.
    """
    size = READ_BYTES[device.type]
    words = torch.ones(size // 4, dtype=torch.float32, device=device)
    halves = words.view(2, -1)
    read = max(size / _fastest(call, device) for call in (*_pure_reads(words), words.amax))
    copy = max(size / _fastest(call, device) for call in _copies(*halves))
    peak = {name: _matmul_peak(name, device) for name in ("float32", "float16", "bfloat16")}
    if device.type == "cpu":
        peak = {name: max(rate, peak["float32"]) for name, rate in peak.items()}
    return Ceilings(read, copy, peak)


class CeilingProbe:
    """The ceilings of a CPU once more, cheap enough to take in every round of a measurement.

    Memory bandwidth on a shared machine changes by half within minutes, so a floor computed from
    what was measured at the start says little about a round taken later. Each call is one sample.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.words = torch.ones(PROBE_BYTES // 4)
        self.square = torch.randn(CPU_SQUARE, CPU_SQUARE).to(dtype)
        self.cpu = torch.device("cpu")
        if self.peak() > FAST_CPU:
            self.square = torch.randn(FAST_SQUARE, FAST_SQUARE).to(dtype)

    def read(self, _round: int = 0) -> float:
        """bytes/s, the best of three pure reads."""
        seconds = min(seconds_of(call, self.cpu)[0] for call in _pure_reads(self.words))
        return PROBE_BYTES / seconds

    def peak(self, _round: int = 0) -> float:
        """FLOP/s of a square matrix product."""
        seconds, _ = seconds_of(lambda: self.square @ self.square.T, self.cpu)
        return 2 * len(self.square) ** 3 / seconds


def _pure_reads(words: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """Operations that read all of ``words`` [n] fp32 once and write next to nothing."""
    halves, rows = words.view(2, -1), words.view(torch.bfloat16).view(-1, ROW)
    return [
        words.sum,
        lambda: torch.dot(halves[0], halves[1]),
        lambda: torch.mv(rows, rows[0]),
    ]


def _copies(target: torch.Tensor, source: torch.Tensor) -> list[Callable[[], object]]:
    """Operations that read ``source`` and write ``target``: what a GPU's copy node does may be
    much slower than a kernel (2.7 against about 4.2 TB/s on an H200)."""
    return [partial(target.copy_, source), partial(torch.neg, source, out=target)]


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return best_seconds(call, ROUNDS)
    call()
    return min(seconds_of(call, device)[0] for _ in range(ROUNDS))


def _matmul_peak(dtype_name: str, device: torch.device) -> float:
    dtype = getattr(torch, dtype_name)
    rate = 0.0
    for side, worth in SQUARES[device.type]:
        if rate < worth:
            break
        a = torch.randn(side, side, device=device).to(dtype)
        b = torch.randn(side, side, device=device).to(dtype)
        rate = max(rate, 2 * side**3 / _fastest(partial(torch.matmul, a, b.T), device))
    return rate

"""The two ceilings every time is held against: pure read bandwidth and peak multiply-add rate.

Measured through operations that do nothing else, by the best of several of them: a ceiling measured
too low would flatter every kernel below it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.timer import seconds_of

READ_BYTES = {"cpu": 2**29, "cuda": 2**32}
PROBE_BYTES = 2**28
SQUARE = {"cpu": 2048, "cuda": 8192}
# From this rate on (FLOP/s) a CPU needs a larger product to show its peak.
FAST_CPU, FAST_SQUARE = 5e11, 4096
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

    On a CPU the peak of a 16-bit type is the best of its own matrix product and of fp32's: where
    there are no 16-bit instructions, widening to fp32 is what a perfect kernel would do.
    """
    size = READ_BYTES[device.type]
    words = torch.ones(size // 4, dtype=torch.float32, device=device)
    halves = words.view(2, -1)
    rows = words.view(torch.bfloat16).view(-1, ROW)
    reads = [lambda: words.sum(), lambda: words.amax(), lambda: torch.dot(halves[0], halves[1])]
    reads.append(lambda: torch.mv(rows, rows[0]))
    read = max(size / _fastest(call, device) for call in reads)
    copy = size / _fastest(lambda: halves[0].copy_(halves[1]), device)
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
        self.rows = self.words.view(torch.bfloat16).view(-1, ROW)
        self.square = torch.randn(SQUARE["cpu"], SQUARE["cpu"]).to(dtype)
        self.cpu = torch.device("cpu")
        if self.peak() > FAST_CPU:
            self.square = torch.randn(FAST_SQUARE, FAST_SQUARE).to(dtype)

    def read(self, _round: int = 0) -> float:
        """bytes/s, the best of three pure reads."""
        halves = self.words.view(2, -1)
        reads = (
            self.words.sum,
            lambda: torch.dot(halves[0], halves[1]),
            lambda: torch.mv(self.rows, self.rows[0]),
        )
        return PROBE_BYTES / min(seconds_of(call, self.cpu)[0] for call in reads)

    def peak(self, _round: int = 0) -> float:
        """FLOP/s of a square matrix product."""
        seconds, _ = seconds_of(lambda: self.square @ self.square.T, self.cpu)
        return 2 * len(self.square) ** 3 / seconds


def _fastest(call, device: torch.device) -> float:
    call()
    return min(seconds_of(call, device)[0] for _ in range(ROUNDS))


def _matmul_peak(dtype_name: str, device: torch.device) -> float:
    # A 16-bit product without 16-bit instructions takes seconds at full size: probe it small first.
    dtype = getattr(torch, dtype_name)
    rate = 0.0
    sides = (256, SQUARE[device.type], FAST_SQUARE)
    for side in sides[:2] if device.type == "cuda" else sides:
        a = torch.randn(side, side, device=device).to(dtype)
        b = torch.randn(side, side, device=device).to(dtype)
        rate = max(rate, 2 * side**3 / _fastest(lambda a=a, b=b: a @ b.T, device))
        if device.type == "cpu" and rate < (2e10 if side == sides[0] else FAST_CPU):
            break
    return rate

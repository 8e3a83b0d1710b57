"""Measures a GPU's rooflines in CUDA graphs, in well under a second of its time.

What is timed is what a captured decode step pays. Every weight is colder than the cache: as many
are multiplied in one graph as fill it several times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .gpu_timer import Run, best_seconds
from .machine import RowCurve

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
WIDTH = 4096  # of a weight: reading it takes several times a launch
_READ_BYTES = 2**30
_COLD = 4  # times the cache
_CALLS = 200  # launches in one graph
_REPEATS = 5

Linear = Callable[[Tensor, Tensor], Tensor]
Best = Callable[[Run, int], float]


def measure_gpu(
    device: torch.device,
    dtype: torch.dtype,
    linear: Linear,
    width: int,
    cache: float,
    best: Best = best_seconds,
) -> tuple[float, float, RowCurve]:
    """Bandwidth in bytes/s, seconds per small launch, and the row curve of ``linear``.

    Args:
        linear: ``(x [rows, width], weight [width, width]) -> [rows, width]``.
        cache: bytes of the last-level cache.
        best: times a run of many launches: ``(run, repeats)`` to the seconds of the fastest.
    """
    data = torch.ones(_READ_BYTES // 4, device=device)
    bandwidth = data.nbytes / best(data.sum, _REPEATS)
    launch = best(partial(_small_calls, torch.ones(1, 64, dtype=dtype, device=device)), _REPEATS)
    count = max(2, -(-int(_COLD * cache) // (width * width * dtype.itemsize)))
    weights = [torch.randn(width, width, dtype=dtype, device=device) for _ in range(count)]
    seconds = []
    for rows in ROWS:
        x = torch.randn(rows, width, dtype=dtype, device=device)
        whole = best(partial(_multiply, linear, x, weights), _REPEATS)
        seconds.append(whole / count / (width * width))
    return bandwidth, launch / _CALLS, RowCurve(tuple(map(float, ROWS)), tuple(seconds))


def _small_calls(x: Tensor) -> None:
    for _ in range(_CALLS):
        torch.add(x, x)


def _multiply(linear: Linear, x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        linear(x, weight)

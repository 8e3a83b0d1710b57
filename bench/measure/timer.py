"""One timer for everything: warm-up, interleaved variants, medians with p20 and p80.

Machines are shared and drift, so variants are never timed one after the other: round ``r`` times
every variant once, in an order rotated by ``r``, and ratios are formed round by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from decoder.perf_model.hardware.gpu_timer import event_seconds

CACHE_FLUSH_BYTES = 96 * 2**20  # above any last-level cache we measure on


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one variant over the rounds."""

    median: float
    p20: float
    p80: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def summarize(seconds: list[float]) -> Timing:
    """Median and the 20th/80th percentile of per-round seconds."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), cuts[0], cuts[-1], len(seconds))


class CacheFlusher:
    """Reads a buffer larger than the last-level cache, so that the next call finds nothing warm."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.ones(CACHE_FLUSH_BYTES // 4, device=device)

    def __call__(self) -> None:
        self.buffer.sum()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def seconds_of(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall seconds of one call (on a GPU, event seconds around it), and what it returned."""
    if device.type == "cuda":
        return event_seconds(call)
    begin = time.perf_counter()
    returned = call()
    return time.perf_counter() - begin, returned


def interleaved(
    variants: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
    before: Callable[[], None] | None = None,
    budget_s: float = float("inf"),
) -> dict[str, list[float]]:
    """Time every variant once per round, order rotated, ``before`` untimed ahead of each call.

    Args:
        variants: name -> call taking the round number (so that it can rotate its inputs). A call
            that returns a float timed itself, as a peer in another process must.
        rounds: timed rounds after one warm-up round; at least 3 are made, whatever ``budget_s``.
        before: untimed preparation of each call, e.g. a cache flush.
        budget_s: stop after this many seconds of rounds.

    Returns:
        Seconds per round for each variant; index r of two variants is the same round.
    """
    device = torch.device(device)
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for round_ in range(-1, rounds):
        if round_ >= 3 and time.perf_counter() - begin > budget_s:
            break
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            if before:
                before()
            elapsed, returned = seconds_of(partial(variants[name], round_), device)
            if round_ >= 0:
                samples[name].append(returned if isinstance(returned, float) else elapsed)
    return samples

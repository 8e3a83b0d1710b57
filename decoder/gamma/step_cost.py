"""What one decoding round costs for a (batch, gamma), corrected by the rounds actually run.

A prior gives the shape (a start-up profile or a fitted model); medians of observed over predicted
time correct it. Ratios rather than seconds are kept, so that an observation at one batch size,
gamma or context says something about its neighbours. An arm is a bucket of batch sizes and a gamma.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from statistics import median_low
from typing import Protocol

_WINDOW = 9  # observations kept per arm: enough for a median, short enough to follow context
_FULL_WEIGHT = 8.0  # an arm weighs as many rounds as it remembers, at most these
_ENOUGH = 5  # observations from which an arm speaks for itself
_GLOBAL_WEIGHT = 0.5  # of the correction common to all arms, in rounds
_FEW = 3  # rounds of which the fastest counts; of more, the median
_SUSPICIOUS = 0.4  # log ratio from the overall correction that few rounds alone do not establish


class RoundCost(Protocol):
    """Seconds of one whole round: drafting, verification and sampling; gamma 0 is plain AR."""

    def __call__(self, batch: int, gamma: int, context: int) -> float: ...


def bucket_of(count: int) -> int:
    """Index of the half-octave of a count."""
    return round(2.0 * math.log2(max(count, 1)))


class MeasuredCost:
    """Interpolates measured round times: linear over gamma, log-log over batch.

    Args:
        seconds: ``(batch, gamma) -> seconds``; every batch needs gamma 0 and one more gamma.
    """

    def __init__(self, seconds: Mapping[tuple[int, int], float]) -> None:
        self._rows: dict[int, list[tuple[int, float]]] = {}
        for (batch, gamma), value in sorted(seconds.items()):
            if batch < 1 or gamma < 0 or not value > 0 or not math.isfinite(value):
                raise ValueError(
                    "a measured cost needs batch >= 1, gamma >= 0 and a positive time, "
                    f"got ({batch}, {gamma}): {value}"
                )
            self._rows.setdefault(batch, []).append((gamma, value))
        if not self._rows:
            raise ValueError("seconds must hold at least one measurement, got none")
        for batch, row in self._rows.items():
            if len(row) < 2 or row[0][0] != 0:
                raise ValueError(
                    f"batch {batch} needs gamma 0 and another gamma, got {[g for g, _ in row]}"
                )
        self._batches = sorted(self._rows)

    def __call__(self, batch: int, gamma: int, context: int = 0) -> float:
        """Seconds of a round; outside the measured batches the nearest slope continues."""
        if len(self._batches) == 1:
            return self._along_gamma(self._batches[0], gamma)
        upper = 1
        while upper < len(self._batches) - 1 and self._batches[upper] < batch:
            upper += 1
        low, high = self._batches[upper - 1], self._batches[upper]
        low_time, high_time = self._along_gamma(low, gamma), self._along_gamma(high, gamma)
        slope = math.log(high_time / low_time) / math.log(high / low)
        if not low <= batch <= high:
            slope = min(max(slope, 0.0), 1.0)  # time grows with batch, at most in proportion
            near, seconds = (low, low_time) if batch < low else (high, high_time)
            return seconds * math.exp(slope * math.log(batch / near))
        return low_time * math.exp(slope * math.log(batch / low))

    def _along_gamma(self, batch: int, gamma: int) -> float:
        row = self._rows[batch]
        upper = 1
        while upper < len(row) - 1 and row[upper][0] < gamma:
            upper += 1
        (g0, t0), (g1, t1) = row[upper - 1], row[upper]
        seconds = t0 + (t1 - t0) * (gamma - g0) / (g1 - g0)
        return max(seconds, 0.5 * min(t0, t1))  # extrapolation must not reach 0


def measure_costs(
    measure: Callable[[int, int], float],
    batches: Iterable[int],
    gammas: Iterable[int],
    repeats: int = 3,
    deadline: float = math.inf,
) -> MeasuredCost:
    """Median round time at each (batch, gamma), measured in interleaved passes.

    Args:
        measure: ``(batch, gamma) -> seconds`` of one whole round, warmed up or not.
        deadline: of ``time.perf_counter()``; no repetition starts after it.
    """
    batches, gammas = sorted(set(batches)), sorted({0, *gammas})
    seen: dict[tuple[int, int], list[float]] = {(b, g): [] for b in batches for g in gammas}
    # The first timing pays for allocations and compilation; it counts where there is no other.
    first = {key: measure(*key) for key in seen}
    for _ in range(repeats):
        for key, times in seen.items():
            if time.perf_counter() < deadline:
                times.append(measure(*key))
    return MeasuredCost({key: median_low(times or [first[key]]) for key, times in seen.items()})


class CorrectedCost:
    """A prior times a correction smoothed over neighbouring arms (batch bucket, gamma).

    Times err on one side: the first round of an arm pays for allocations and compiled shapes, any
    round may be stalled. So the fastest of few rounds counts, and the median of more.
    """

    def __init__(self, prior: RoundCost) -> None:
        self._prior = prior
        self._rounds: dict[tuple[int, int], deque[float]] = {}  # log of observed over prior time
        self._ratios: dict[tuple[int, int], float] = {}

    def observations(self, batch: int, gamma: int) -> int:
        """Rounds remembered at this bucket and gamma."""
        return len(self._rounds.get((bucket_of(batch), gamma), ()))

    def observe(
        self, batch: int, gamma: int, context: int, seconds: float, draft: float = 0.0
    ) -> None:
        """Record the time of one round; ``draft`` is part of it and not needed here."""
        if not seconds > 0 or not math.isfinite(seconds):
            return
        arm = (bucket_of(batch), gamma)
        window = self._rounds.setdefault(arm, deque(maxlen=_WINDOW))
        window.append(math.log(seconds / self._prior(batch, gamma, context)))
        self._ratios[arm] = typical(window)

    def seconds(self, batch: int, gamma: int, context: int) -> float:
        """Expected seconds of a round."""
        bucket = bucket_of(batch)
        prior = self._prior(batch, gamma, context)
        if self.observations(batch, gamma) >= _ENOUGH:
            return prior * math.exp(self._ratios[(bucket, gamma)])
        overall = median_low(self._ratios.values()) if self._ratios else 0.0
        total, weight = _GLOBAL_WEIGHT * overall, _GLOBAL_WEIGHT
        for (other_bucket, other_gamma), ratio in self._ratios.items():
            # rounds with drafts resemble each other more than they resemble plain ones
            step = 0.8 if gamma and other_gamma else 2.0
            distance = step * abs(other_gamma - gamma) + 1.5 * abs(other_bucket - bucket)
            if distance > 8.0:
                continue
            count = min(len(self._rounds[(other_bucket, other_gamma)]), _FULL_WEIGHT)
            if count < _FEW and ratio - overall > _SUSPICIOUS:
                count *= 0.1  # a stall, not a cost, until it happens again
            kernel = count * math.exp(-distance)
            total, weight = total + kernel * ratio, weight + kernel
        return prior * math.exp(total / weight)


def typical(values: Collection[float]) -> float:
    """The fastest of up to three times, the (lower) median of more: stalls only slow down."""
    return min(values) if len(values) <= _FEW else median_low(values)

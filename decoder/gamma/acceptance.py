"""A running estimate of how many tokens a round emits, for every draft length.

Acceptance is tracked per position, conditional on all earlier positions having been accepted, so a
mixture of easy and hard rows (later positions accepted more) and a drafter that tires (later
positions accepted less) are both represented. Costs are not this file's concern.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import accumulate

_PRIOR_MEAN = 0.6
_PRIOR_TRIALS = 4.0
_SHRINK_TRIALS = 8.0  # evidence a position needs before it differs from the one before it
_HORIZON_TRIALS = 400.0
_HORIZON_ROUNDS = 16.0  # a wide batch still remembers this many rounds
_FAST_TRIALS = 60.0
_IDLE_DECAY = 0.99  # per round without drafts; evidence ages, so that probes can change a mind
_IDLE_FLOOR = 16.0


def expected_tokens(rates: Sequence[float]) -> list[float]:
    """Expected tokens of a round of gamma = 0..len(rates), bonus included.

    Args:
        rates: acceptance at positions 1, 2, … given that all earlier ones were accepted.
    """
    survivals = accumulate(rates, operator.mul, initial=1.0)
    return list(accumulate(survivals))


class AcceptanceEstimator:
    """Beta-prior, exponentially forgetting estimate of per-position conditional acceptance."""

    def __init__(self, max_gamma: int, prior_mean: float = _PRIOR_MEAN) -> None:
        if max_gamma < 1:
            raise ValueError(f"max_gamma must be at least 1, got {max_gamma}")
        if not 0.0 < prior_mean < 1.0:
            raise ValueError(f"prior_mean must lie in (0, 1), got {prior_mean}")
        self.max_gamma = max_gamma
        self.prior_mean = prior_mean
        self._hits = [0.0] * max_gamma
        self._trials = [0.0] * max_gamma
        self._fast_hits = 0.0
        self._fast_trials = 0.0

    @property
    def trials(self) -> float:
        """Draft positions judged so far, after forgetting."""
        return sum(self._trials)

    def update(self, gamma: int, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Record one round.

        A position that the drafter left empty while gamma allowed it counts as rejected: goodput
        at this gamma lacks that token either way.

        Args:
            gamma: draft length asked for.
            drafted: valid drafts per row, each at most gamma.
            accepted: accepted drafts per row, each at most its ``drafted``.
        """
        if gamma == 0:
            self.idle(1)
            return
        if gamma > self.max_gamma:
            raise ValueError(f"gamma must be at most max_gamma={self.max_gamma}, got {gamma}")
        ended = [0] * (gamma + 1)  # rows by number of accepted drafts
        for count in accepted:
            ended[count if count < gamma else gamma] += 1
        trials, hits, alive = [], [], len(accepted)
        for count in ended[:gamma]:
            trials.append(alive)
            alive -= count
            hits.append(alive)
        new = sum(trials)
        if new == 0:
            return
        keep = math.exp(-new / max(_HORIZON_TRIALS, _HORIZON_ROUNDS * new))
        for position in range(self.max_gamma):
            # Positions beyond gamma keep their evidence: nothing was learnt about them.
            if position < gamma:
                self._hits[position] = self._hits[position] * keep + hits[position]
                self._trials[position] = self._trials[position] * keep + trials[position]
        self._detect_change(sum(hits), new)

    def conditional(self) -> list[float]:
        """Acceptance at positions 1..max_gamma given that all earlier ones were accepted."""
        rate = (sum(self._hits) + self.prior_mean * _PRIOR_TRIALS) / (self.trials + _PRIOR_TRIALS)
        rates = []
        for hits, trials in zip(self._hits, self._trials, strict=True):
            rate = (hits + rate * _SHRINK_TRIALS) / (trials + _SHRINK_TRIALS)
            rates.append(rate)
        return rates

    def expected_tokens(self) -> list[float]:
        """Expected tokens a row emits in a round of gamma = 0..max_gamma, bonus included."""
        return expected_tokens(self.conditional())

    def idle(self, rounds: int) -> None:
        """Age the evidence by ``rounds`` without drafts."""
        trials = self.trials
        if trials <= _IDLE_FLOOR:
            return
        keep = max(_IDLE_DECAY**rounds, _IDLE_FLOOR / trials)
        self._hits = [value * keep for value in self._hits]
        self._trials = [value * keep for value in self._trials]

    def _detect_change(self, hits: float, trials: float) -> None:
        """Drop old evidence when the recent rate leaves it by more than four standard errors."""
        keep = math.exp(-trials / max(_FAST_TRIALS, 2.0 * trials))
        self._fast_hits = self._fast_hits * keep + hits
        self._fast_trials = self._fast_trials * keep + trials
        if self._fast_trials < 20.0 or self.trials < 1.5 * self._fast_trials:
            return
        slow = sum(self._hits) / self.trials
        fast = self._fast_hits / self._fast_trials
        spread = math.sqrt(max(slow * (1.0 - slow), 0.01) / self._fast_trials)
        if abs(fast - slow) <= 4.0 * spread:
            return
        weight = self._fast_trials / self.trials
        shift = fast / max(slow, 1e-6)
        for position in range(self.max_gamma):
            self._trials[position] *= weight
            moved = self._hits[position] * weight * shift
            self._hits[position] = min(moved, self._trials[position])

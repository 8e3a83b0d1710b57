"""What the controller may lose by trying draft lengths other than the one it holds best.

A probe is charged what it did lose rather than what it was expected to, up to a factor: a budget
that forgives itself is none, and a stalled round says nothing about the probe.
"""

from __future__ import annotations

from collections import deque
from statistics import median_low
from typing import NamedTuple

_SHARE = 0.005  # of the elapsed time may be lost to probing
_FLOOR = 0.05  # of its worth is what any probe counts: a flat optimum is no reason to probe always
_OVERDRAWN = 2.0  # times what it was expected to lose is the most that a probe is charged
_CATCH_UPS = 4  # timings kept of a drafter catching up


class Probe(NamedTuple):
    """Rounds of another draft length.

    Attributes:
        gamma: the draft length; rounds: how many.
        loss: seconds expected to be lost in all of them.
        credit: seconds that may be lost before the budget has grown.
    """

    gamma: int
    rounds: int
    loss: float
    credit: float


class ProbeBudget:
    """Keeps the books: time spent, time lost to probes, time a drafter needs to catch up."""

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._lost = 0.0
        self._expected = 0.0  # loss per round of the probe allowed last
        self._plain_rounds = 0  # since the last draft
        # Seconds that a draft after plain rounds takes longer, per such round.
        self._catch_ups: deque[float] = deque(maxlen=_CATCH_UPS)

    @property
    def lost_share(self) -> float:
        """Share of the time spent that probing has lost."""
        return self._lost / self._elapsed if self._elapsed else 0.0

    def spend(self, gamma: int, seconds: float) -> None:
        """Book one finished round."""
        self._elapsed += seconds
        self._plain_rounds = 0 if gamma else self._plain_rounds + 1

    def charge(self, seconds: float, worth: float) -> None:
        """Book a round that was a probe, whose tokens would otherwise have taken ``worth``."""
        least = _FLOOR * worth
        self._lost += min(max(seconds - worth, least), max(_OVERDRAWN * self._expected, least))

    def observe_catch_up(self, seconds: float) -> None:
        """Time that the draft of the round at hand took longer, for the plain ones before it."""
        self._catch_ups.append(max(seconds, 0.0) / max(self._plain_rounds, 1))

    def allows(self, probe: Probe) -> bool:
        """Whether what the probe is expected to lose fits what may still be lost."""
        # The lower of few catch-ups: a stalled round is none.
        catch_up = median_low(self._catch_ups or (0.0,)) * self._plain_rounds
        loss = probe.loss + (catch_up if probe.gamma else 0.0)
        self._expected = loss / probe.rounds
        return self._elapsed > 0 and self._lost + loss <= probe.credit + _SHARE * self._elapsed

"""What the controller may lose by trying draft lengths other than the one it holds best.

A probe is charged what it did lose rather than what it was expected to, up to a factor: a budget
that forgives itself is none, and a stalled round says nothing about the probe.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median_low
from typing import NamedTuple

_SHARE = 0.005  # of the elapsed time may be lost to probing
# A probe may use that share times its promise to this power: what looks far worse can wait.
_DOUBT = 2
# A probe is charged at least this part of the time that its tokens would have taken without it:
# where all draft lengths are equally good it loses nothing, which is no reason to go on probing.
_FLOOR = 0.05
_OVERDRAWN = 2.0  # a probe is charged at most this many times what it was expected to lose
# Rounds over which books are forgotten. Kept for ever, what a long past lost on probes would forbid
# them, or what it saved would pay for many, for a part of its time when something has changed.
_HORIZON = 1000
_STALLED = 10.0  # a round counts as this many usual ones at most: a pause has earned no probes
_CATCH_UPS = 4  # timings kept of a drafter catching up


class Probe(NamedTuple):
    """Rounds of another draft length.

    Attributes:
        gamma: the draft length.
        rounds: how many.
        loss: seconds expected to be lost in all of them.
        credit: seconds that may be lost before the budget has grown.
        promise: its expected rate of tokens over that of the draft length held best, at most 1.
    """

    gamma: int
    rounds: int
    loss: float
    credit: float
    promise: float = 1.0


class ProbeBudget:
    """Keeps the books: time spent, time lost to probes, time a drafter needs to catch up."""

    def __init__(self) -> None:
        self._rounds = 0.0  # of late, as all that is spent and lost
        self._elapsed = 0.0
        self._lost = 0.0
        self._since = 0.0  # seconds since the last probe: however dear one is, it comes
        self._expected = 0.0  # loss per round of the probe allowed last
        self._plain_rounds = math.inf  # since the last draft; a new drafter has seen no prompt
        # Seconds that a draft after plain rounds takes longer, per token a row missed.
        self._catch_ups: deque[float] = deque(maxlen=_CATCH_UPS)

    @property
    def lost_share(self) -> float:
        """Share of the time spent of late that probing has lost."""
        return self._lost / self._elapsed if self._elapsed else 0.0

    def spend(self, gamma: int, seconds: float) -> None:
        """Book one finished round."""
        if self._rounds:
            seconds = min(seconds, _STALLED * self._elapsed / self._rounds)
        keep = 1.0 - 1.0 / _HORIZON
        self._rounds = keep * self._rounds + 1.0
        self._lost *= keep
        self._elapsed = keep * self._elapsed + seconds
        self._since += seconds
        self._plain_rounds = 0 if gamma else self._plain_rounds + 1

    def charge(self, seconds: float, worth: float) -> None:
        """Book a round that was a probe, whose tokens would otherwise have taken ``worth``."""
        self._since = 0.0
        least = _FLOOR * worth
        self._lost += min(max(seconds - worth, least), max(_OVERDRAWN * self._expected, least))

    def observe_catch_up(self, seconds: float, context: int) -> None:
        """Time that the draft of the round at hand took longer, for the plain ones before it."""
        self._catch_ups.append(max(seconds, 0.0) / max(self._missed(context), 1))

    def allows(self, probe: Probe, context: int) -> bool:
        """Whether what the probe is expected to lose fits what may still be lost.

        Args:
            context: tokens per row.
        """
        # The lower of few catch-ups: a stalled round is none.
        catch_up = median_low(self._catch_ups or (0.0,)) * self._missed(context)
        loss = probe.loss + (catch_up if probe.gamma else 0.0)
        self._expected = loss / probe.rounds
        earned = _SHARE * probe.promise**_DOUBT * max(self._elapsed, self._since)
        return self._elapsed > 0 and self._lost + loss <= probe.credit + earned

    def _missed(self, context: int) -> float:
        """Tokens that a drafter has to catch up on in a row: never more than the row holds.

        Without that bound a catch-up would be feared more with every plain round, faster than the
        budget grows, and a drafter once given up would never be tried again.
        """
        return min(self._plain_rounds, context)

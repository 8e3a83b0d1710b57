"""A log of rounds that also keeps what they spent in collectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decoder.engine.profile_rounds import RoundLog
from decoder.parallel.collectives import clock


class RankLog(RoundLog):
    """A ``RoundLog`` of rank 0.

    What it sees of collectives is the sums of a round's forwards and the message before each, with
    the waiting for other ranks. Drafts that are not the target's own have none, so that of a round
    is that of its verify step.
    """

    def __init__(self, gamma: int = 0, max_gamma: int = 0) -> None:
        super().__init__(gamma, max_gamma)
        self._seconds: list[float] = []  # by round
        self._before = clock.seconds

    def observe(
        self,
        gamma: int,
        batch: int,
        drafted: Sequence[int],
        accepted: Sequence[int],
        times: Mapping[str, float],
    ) -> None:
        """Keep the round."""
        super().observe(gamma, batch, drafted, accepted, times)
        now = clock.seconds
        self._seconds.append(now - self._before)
        self._before = now

    def collective(self, batch: int) -> list[float]:
        """Seconds in collectives of each round that ``full`` gives; nothing in one process."""
        return [self._seconds[place] for place in self.places(batch)] if clock.calls else []

"""Predicted seconds of the parts of a round."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankTimes:
    """Seconds of one target forward over ranks, on the rank that all others wait for.

    Args:
        forward: all of it.
        collective: in the collectives of all MoE layers, without the wait for the busiest rank.
    """

    forward: float
    collective: float


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """Seconds of the parts of one speculative round and of one autoregressive step.

    Args:
        ar, verify: target forwards over 1 and gamma + 1 tokens per row.
        draft: ONE draft forward and its sampling.
        reject: acceptance and sampling of a round; ``sample`` the same of a plain step.
    """

    ar: float
    verify: float
    draft: float
    reject: float
    sample: float

    @property
    def ar_step(self) -> float:
        """Seconds of one autoregressive step, sampling included."""
        return self.ar + self.sample

    def round(self, gamma: int) -> float:
        """Seconds of a round of ``gamma`` drafts."""
        return gamma * self.draft + self.verify + self.reject

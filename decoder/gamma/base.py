"""Who decides the draft length: what the engine asks, and the plainest answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

AUTO = "auto"  # in place of a number: choose the draft length of every round
DEFAULT_MAX_GAMMA = 8  # the longest then considered

Counts = Sequence[int]  # by row
Times = Mapping[str, float]  # phase -> seconds


class Controller(Protocol):
    """What the engine asks each round."""

    def choose(self, live_batch: int, context: int) -> int: ...

    def observe(
        self, gamma: int, batch: int, drafted: Counts, accepted: Counts, times: Times
    ) -> None: ...

    def admitted(self, tokens: float, seconds: float, prompt_tokens: int) -> None: ...

    def explain(self) -> str: ...


class FixedGamma:
    """Always the same draft length."""

    def __init__(self, gamma: int) -> None:
        if gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {gamma}")
        self.gamma = gamma
        self.max_gamma = gamma

    def choose(self, live_batch: int, context: int) -> int:
        """Return the fixed gamma."""
        return self.gamma

    def observe(
        self, gamma: int, batch: int, drafted: Counts, accepted: Counts, times: Times
    ) -> None:
        """Ignore the round: nothing depends on it."""

    def admitted(self, tokens: float, seconds: float, prompt_tokens: int) -> None:
        """Ignore the requests, too."""

    def explain(self) -> str:
        """Say that the choice was the user's."""
        return f"gamma {self.gamma}: fixed by the caller"

"""Round costs learnt from the rounds themselves, when no profile is given.

A verification's time depends on the tokens it processes, ``B * (gamma + 1)``, far more than on how
they split into rows and drafts; a draft step's on the batch. Two curves therefore carry what was
seen at one (batch, gamma) to all others; an arm run often enough speaks for itself.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque

from .step_cost import bucket_of, typical

_WINDOW = 9  # rounds remembered per arm, and per point of a curve
_ENOUGH = 5  # rounds from which an arm speaks for itself


class _Curve:
    """Typical seconds over a positive quantity, log-log between quarter-octave buckets."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[int, float]]] = {}
        self._points: list[tuple[float, float]] = []  # log x, log seconds

    def add(self, x: int, seconds: float) -> None:
        bucket = round(4.0 * math.log2(x))  # fine: neighbouring gammas must not share one
        self._seen.setdefault(bucket, deque(maxlen=_WINDOW)).append((x, seconds))
        points = []
        for _, rounds in sorted(self._seen.items()):
            middle = sum(math.log(x) for x, _ in rounds) / len(rounds)
            points.append((middle, math.log(typical([s for _, s in rounds]))))
        self._points = points

    def covers(self, x: int, factor: float) -> bool:
        return any(abs(seen - math.log(x)) <= math.log(factor) for seen, _ in self._points)

    def __bool__(self) -> bool:
        return bool(self._points)

    def __call__(self, x: int) -> float:
        points, log_x = self._points, math.log(x)
        if len(points) == 1:
            return math.exp(points[0][1])
        upper = min(max(bisect_left(points, (log_x, -math.inf)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[upper - 1], points[upper]
        if x0 <= log_x <= x1:
            return math.exp(y0 + (y1 - y0) * (log_x - x0) / (x1 - x0))
        # Outside, time neither falls with work nor grows faster than it.
        slope = min(max((y1 - y0) / (x1 - x0), 0.0), 1.0)
        near_x, near_y = (x0, y0) if log_x < x0 else (x1, y1)
        return math.exp(near_y + slope * (log_x - near_x))


class LearnedCost:
    """Seconds of a round from verification over tokens and drafting over batch."""

    def __init__(self) -> None:
        self._verify = _Curve()
        self._draft = _Curve()
        # By arm, (bucket of batch sizes, gamma): (batch, seconds) of its latest rounds.
        self._rounds: dict[tuple[int, int], deque[tuple[int, float]]] = {}

    def observe(
        self, batch: int, gamma: int, context: int, seconds: float, draft: float = 0.0
    ) -> None:
        """Record one round of ``seconds``, of which ``draft`` went into drafting."""
        rest = seconds - draft if gamma else seconds
        if not (rest > 0 and draft >= 0 and math.isfinite(seconds)):
            return
        self._verify.add(batch * (gamma + 1), rest)
        if gamma and draft > 0:
            self._draft.add(batch, draft / gamma)
        arm = (bucket_of(batch), gamma)
        self._rounds.setdefault(arm, deque(maxlen=_WINDOW)).append((batch, seconds))

    def observations(self, batch: int, gamma: int) -> int:
        """Rounds remembered at this bucket and gamma."""
        return len(self._rounds.get((bucket_of(batch), gamma), ()))

    def knows_verify(self, tokens: int, factor: float) -> bool:
        """Whether a verification within this factor of ``tokens`` was timed."""
        return self._verify.covers(tokens, factor)

    def knows_draft(self) -> bool:
        """Whether any draft step was timed."""
        return bool(self._draft)

    def seconds(self, batch: int, gamma: int, context: int) -> float:
        """Expected seconds of a round; 1 before anything was observed."""
        if not self._verify:
            return 1.0
        expected = self._from_curves(batch, gamma)
        rounds = self._rounds.get((bucket_of(batch), gamma), ())
        if len(rounds) < _ENOUGH:
            return expected
        # Rounds of a neighbouring batch size count as the curves say they differ.
        scale = {b: expected / self._from_curves(b, gamma) for b, _ in rounds if b != batch}
        return typical([s * scale.get(b, 1.0) for b, s in rounds])

    def _from_curves(self, batch: int, gamma: int) -> float:
        seconds = self._verify(batch * (gamma + 1))
        if gamma:  # before any draft was timed, a draft step is taken for a tenth of a plain step
            step = self._draft(batch) if self._draft else 0.1 * self._verify(batch)
            seconds += gamma * step
        return seconds

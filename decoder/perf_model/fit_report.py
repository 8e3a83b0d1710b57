"""What a fit is worth: errors on points it has and has not seen, and whether they pin it down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .observations import Observation

_CONDITION_LIMIT = 1e4


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Relative errors of predicted speedup: ``|predicted / measured - 1|``."""

    count: int
    median: float
    p90: float
    worst: float
    mse: float  # of the speedup itself, mean over points

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {name: getattr(self, name) for name in self.__slots__}


def evaluate(
    predict: Callable[[Observation], float], observations: Iterable[Observation]
) -> ErrorSummary:
    """Errors of ``predict`` over the observations that carry a speedup.

    Raises:
        ValueError: none does.
    """
    measured = [o for o in observations if o.speedup is not None]
    if not measured:
        raise ValueError("evaluate needs observations with a speedup, got none")
    truth = np.array([o.speedup for o in measured], dtype=float)
    guess = np.array([predict(o) for o in measured])
    relative = np.abs(guess / truth - 1.0)
    return ErrorSummary(
        count=len(measured),
        median=float(np.median(relative)),
        p90=float(np.percentile(relative, 90)),
        worst=float(relative.max()),
        mse=float(np.mean((guess - truth) ** 2)),
    )


@dataclass(frozen=True, slots=True)
class Identifiability:
    """Whether the points determine the parameters.

    Args:
        condition: largest over smallest singular value of the column-scaled Jacobian.
        rank: singular values above 1 / 1e4 of the largest.
        undetermined: parameters that take part in the directions below that, or that no point sees.
    """

    condition: float
    rank: int
    parameters: int
    undetermined: tuple[str, ...]

    @property
    def warning(self) -> str | None:
        """One line, or None when all is well."""
        if not self.undetermined:
            return None
        return (
            f"the points determine {self.rank} of {self.parameters} parameters (condition number "
            f"{self.condition:.1e}); not determined: {', '.join(self.undetermined)}"
        )


def identifiability(jacobian: np.ndarray, names: Sequence[str]) -> Identifiability:
    """Read a Jacobian ``[points, parameters]`` of residuals, taken at the solution."""
    scale = np.linalg.norm(jacobian, axis=0)
    seen = scale > 1e-9 * max(float(scale.max()), 1e-300)
    undetermined = {name for name, ok in zip(names, seen, strict=True) if not ok}
    kept = [name for name, ok in zip(names, seen, strict=True) if ok]
    _, values, directions = np.linalg.svd(jacobian[:, seen] / scale[seen], full_matrices=False)
    weak = values < values[0] / _CONDITION_LIMIT
    for direction in directions[weak]:
        undetermined |= {n for n, x in zip(kept, direction, strict=True) if abs(x) > 0.2}
    missing = len(kept) - len(values)  # fewer points than parameters
    if missing > 0:
        undetermined |= set(kept)
    smallest = values[-1] if missing <= 0 and len(kept) == len(names) else 0.0
    return Identifiability(
        condition=float(values[0] / smallest) if smallest > 0 else float("inf"),
        rank=int((~weak).sum()),
        parameters=len(names),
        undetermined=tuple(name for name in names if name in undetermined),
    )

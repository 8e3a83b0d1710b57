"""One measured (batch, gamma) cell, checked, and the choice of which cells to fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

MIN_POINTS = 10  # as many as the paper's model has parameters; its Table 3 starts there

_TIMES = ("ar_time", "verify_time", "draft_time", "reject_time", "speedup")


@dataclass(frozen=True, slots=True)
class Observation:
    """Times of one cell; whatever was not measured is None.

    Args:
        batch, gamma: ``B`` sequences, draft length.
        sigma: emitted tokens / possible tokens in that run.
        speedup: speculative over autoregressive tokens/s, end to end.
        ar_time: seconds of one autoregressive target forward, ``T_T(B, 1)``.
        verify_time: seconds of one verification forward.
        draft_time: seconds of ONE draft forward, ``T_D(B, 1)``.
        reject_time: seconds of acceptance and sampling per round.
        top_k: experts per token where it is not the model's own.
        context: tokens in each sequence's cache.
        memory_speed: memory bandwidth while the cell was measured, over that of the machine's
            description. On a shared machine it drifts by half within minutes.
    """

    batch: int
    gamma: int
    sigma: float
    speedup: float | None = None
    ar_time: float | None = None
    verify_time: float | None = None
    draft_time: float | None = None
    reject_time: float | None = None
    top_k: int | None = None
    context: int = 0
    memory_speed: float | None = None

    def __post_init__(self) -> None:
        if self.batch < 1 or self.gamma < 1 or self.context < 0:
            raise ValueError(
                "an observation needs batch >= 1, gamma >= 1 and context >= 0, got "
                f"batch {self.batch}, gamma {self.gamma}, context {self.context}"
            )
        if not 1.0 / (self.gamma + 1) - 1e-6 <= self.sigma <= 1.0 + 1e-6:
            raise ValueError(
                f"sigma must lie in [1 / (gamma + 1), 1], got {self.sigma} at gamma {self.gamma}"
            )
        given = {name: getattr(self, name) for name in _TIMES}
        for name, value in {**given, "memory_speed": self.memory_speed}.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if all(value is None for value in given.values()):
            raise ValueError(f"an observation needs one of {_TIMES}, got none")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict without the fields that were not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Observation:
        """Read a dict; other keys than ours are ignored (a benchmark line carries more).

        Raises:
            ValueError: a required key is missing or a value has the wrong type or range.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"an observation must be a JSON object, got {type(data).__name__}")
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = data.get(field.name)
            if value is None:
                if field.name in ("batch", "gamma", "sigma"):
                    raise ValueError(
                        f"an observation needs {field.name!r}, got keys {sorted(data)}"
                    )
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{field.name} must be a number, got {value!r}")
            integer = field.name in ("batch", "gamma", "top_k", "context")
            if integer and value != int(value):
                raise ValueError(f"{field.name} must be a whole number, got {value!r}")
            values[field.name] = int(value) if integer else float(value)
        return cls(**values)


def require_points(observations: Sequence[Observation], quantity: str = "speedup") -> None:
    """Raise unless there are at least ``MIN_POINTS`` cells carrying ``quantity``."""
    usable = sum(getattr(o, quantity) is not None for o in observations)
    if usable < MIN_POINTS:
        raise ValueError(
            f"a fit needs at least {MIN_POINTS} observations with {quantity}, got {usable} of "
            f"{len(observations)}"
        )


def paper_order(observations: Sequence[Observation]) -> list[Observation]:
    """Sorted as in the paper: by K, then gamma, then batch (then context)."""
    return sorted(observations, key=lambda o: (o.top_k or 0, o.gamma, o.batch, o.context))


def stride_indices(count: int, points: int, begin: int = 0) -> list[int]:
    """The paper's sampling: every ``stride``-th of the sorted cells, ``stride = count // points``.

    228 cells and 21 points give stride 11 from 0, as in its Table 3.
    """
    if not 1 <= points <= count:
        raise ValueError(f"points must lie in [1, {count}], got {points}")
    stride = max(1, math.ceil(count / points))
    return list(range(begin, count, stride))


def spread_indices(observations: Sequence[Observation], points: int) -> list[int]:
    """Greedy farthest-point choice over (log K, log gamma, log batch, log context).

    Strides can miss a region (the paper's bad fits, m = 12 and 13, lack large or medium batches);
    this starts at the extremes and fills the largest gap each time. Deterministic.
    """
    if not 1 <= points <= len(observations):
        raise ValueError(f"points must lie in [1, {len(observations)}], got {points}")
    features = np.log([[o.top_k or 1, o.gamma + 1, o.batch, o.context + 64] for o in observations])
    features -= features.min(0)
    span = features.max(0)
    features /= np.where(span > 0, span, 1.0)
    chosen = [int(np.argmin(features.sum(1)))]
    distance = np.linalg.norm(features - features[chosen[0]], axis=1)
    while len(chosen) < points:
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(features - features[chosen[-1]], axis=1))
    return sorted(chosen)


def d_optimal_indices(
    jacobian: Callable[[], np.ndarray] | np.ndarray, points: int, ridge: float = 1e-6
) -> list[int]:
    """Greedy D-optimal design: each pick adds most to ``log det(J^T J)``.

    Args:
        jacobian: ``[cells, parameters]`` sensitivities at a rough fit or the machine's prior.
    """
    matrix = np.asarray(jacobian() if callable(jacobian) else jacobian, dtype=float)
    if not 1 <= points <= len(matrix):
        raise ValueError(f"points must lie in [1, {len(matrix)}], got {points}")
    scale = np.linalg.norm(matrix, axis=0)
    matrix = matrix / np.where(scale > 0, scale, 1.0)
    inverse = np.eye(matrix.shape[1]) / ridge
    chosen: list[int] = []
    for _ in range(points):
        gain = np.einsum("ij,jk,ik->i", matrix, inverse, matrix)
        gain[chosen] = -np.inf
        pick = int(np.argmax(gain))
        chosen.append(pick)
        step = inverse @ matrix[pick]
        inverse -= np.outer(step, step) / (1.0 + matrix[pick] @ step)
    return sorted(chosen)

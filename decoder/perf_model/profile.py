"""The JSON in which a fit is kept: written by ``bench fit``, read by controller and planner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from decoder.perf_model.hardware.machine import Machine

from .fit_report import ErrorSummary
from .forward_fit import ForwardFit, model_from_json, model_to_json
from .forward_model import ForwardModel
from .model_spec import ModelSpec
from .observations import MIN_POINTS
from .paper_model import PaperModel

SCHEMA = "moesd-profile/1"


@dataclass(frozen=True)
class Profile:
    """A fitted machine and model pair.

    Args:
        model: the improved model with its fitted numbers.
        points: cells fitted; held_out: errors on cells that were not.
        context: tokens in the caches during the measurement.
        paper: the paper's model fitted to the same cells, for comparison.
        environment: device, versions, commit, command; free form.
    """

    model: ForwardModel
    points: int
    held_out: ErrorSummary | None = None
    context: int = 0
    paper: PaperModel | None = None
    warnings: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.points < MIN_POINTS:
            raise ValueError(f"a profile needs at least {MIN_POINTS} points, got {self.points}")

    @classmethod
    def from_fit(cls, fit: ForwardFit, **rest: Any) -> Profile:
        """A profile of an improved fit; ``rest`` are the other fields."""
        warning = fit.identifiability.warning
        rest.setdefault("warnings", (warning,) if warning else ())
        return cls(model=fit.model, points=fit.points, **rest)

    def round_cost(self, batch: int, gamma: int, context: int) -> float:
        """Seconds of a round: the ``costs`` of ``AutoGamma``."""
        key = (batch, gamma, max(64, 1 << max(context - 1, 1).bit_length()))
        if key not in self._costs:
            self._costs[key] = self.model.round_cost(*key)
        return self._costs[key]

    @cached_property
    def _costs(self) -> dict[tuple[int, int, int], float]:
        return {}

    def check_target(self, spec: ModelSpec) -> None:
        """Refuse a profile of another architecture.

        Raises:
            ValueError: parameter totals or experts differ.
        """
        mine = self.model.target
        if (mine.total_params, mine.moe) != (spec.total_params, spec.moe):
            raise ValueError(
                f"the profile is of {mine.name!r} ({mine.total_params:,} parameters), got a target "
                f"{spec.name!r} with {spec.total_params:,}"
            )

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        model = self.model
        data = {
            "schema": SCHEMA,
            "machine": model.machine.to_json(),
            "target": model.target.to_json(),
            "draft": model.draft.to_json() if model.draft else None,
            "dtype": model.dtype,
            "improved": model_to_json(model),
            "paper": self.paper.to_json() if self.paper else None,
            "points": self.points,
            "context": self.context,
            "held_out": self.held_out.to_json() if self.held_out else None,
            "warnings": list(self.warnings),
            "environment": dict(self.environment),
        }
        Path(path).write_text(json.dumps(data, indent=1) + "\n")


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile.

    Raises:
        ValueError: not JSON, another schema, missing or malformed fields, or too few points; the
            message names the file.
    """
    try:
        return _parse(json.loads(Path(path).read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a usable profile: {reason}") from error


def _parse(data: Any) -> Profile:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"schema must be {SCHEMA!r}, got {got!r}")
    machine = Machine.from_json(data["machine"])
    draft = ModelSpec.from_json(data["draft"]) if data.get("draft") else None
    target = ModelSpec.from_json(data["target"])
    model = ForwardModel(target, machine, draft, dtype=str(data["dtype"]))
    held_out = data.get("held_out")
    paper = data.get("paper")
    return Profile(
        model=model_from_json(model, data["improved"]),
        points=int(data["points"]),
        held_out=ErrorSummary(**held_out) if held_out is not None else None,
        context=int(data.get("context", 0)),
        paper=PaperModel.from_json(paper) if paper is not None else None,
        warnings=tuple(data.get("warnings", ())),
        environment=data.get("environment", {}),
    )

"""Decode measurements as the performance model sees them: setups (machine, specs) and cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure.record import read_lines
from decoder.perf_model.forward_model import ForwardModel
from decoder.perf_model.hardware.machine import Machine
from decoder.perf_model.model_spec import ModelSpec
from decoder.perf_model.observations import Observation


@dataclass(frozen=True, slots=True)
class Cells:
    """All cells of one target on one machine.

    Attributes:
        model: the machine's own prediction for that target and draft (nothing fitted).
        observations: one per cell, as measured.
        lines: the JSON lines behind them, same order.
    """

    model: ForwardModel
    observations: list[Observation]
    lines: list[dict[str, Any]]


def setup_fields(
    target: ModelSpec, draft: ModelSpec | None, machine: Machine, dtype: str
) -> dict[str, Any]:
    """What a ``decode`` line carries so that it can be fitted without the model at hand."""
    return {
        "target_spec": target.to_json(),
        "draft_spec": draft.to_json() if draft else None,
        "machine": machine.to_json(),
        "model_dtype": dtype,
    }


def load_cells(paths: Sequence[str | Path]) -> list[Cells]:
    """Group ``decode`` lines by target; lines of one target share the first line's machine.

    Raises:
        ValueError: no decode lines, or a line without its setup.
    """
    lines = list(read_lines(paths, "decode"))
    if not lines:
        raise ValueError(f"no decode lines in {', '.join(map(str, paths))}")
    return group_cells(lines)


def group_cells(lines: Iterable[dict[str, Any]]) -> list[Cells]:
    """``decode`` lines as cells, one group per target."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["target"], []).append(line)
    return [_cells(group) for group in groups.values()]


def _cells(lines: list[dict[str, Any]]) -> Cells:
    first = lines[0]
    try:
        draft = first["draft_spec"]
        model = ForwardModel(
            ModelSpec.from_json(first["target_spec"]),
            Machine.from_json(first["machine"]),
            ModelSpec.from_json(draft) if draft else None,
            dtype=first["model_dtype"],
        )
    except KeyError as error:
        raise ValueError(f"a decode line needs {error}, got {sorted(first)}") from None
    return Cells(model, [Observation.from_json(line) for line in lines], lines)

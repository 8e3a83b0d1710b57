"""Decode measurements as the performance model sees them: setups (machine, specs) and cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gguf.contents import PLAIN
from bench.measure.record import read_lines
from decoder.perf_model.forward_model import ForwardModel
from decoder.perf_model.hardware.machine import Machine
from decoder.perf_model.model_spec import ModelSpec
from decoder.perf_model.observations import Observation

# Kinds of line that hold a cell: of imposed acceptance, and of a trained pair on a data set.
DECODE, TRAINED = "decode", "trained"


@dataclass(frozen=True, slots=True)
class Cells:
    """All cells of one target and drafter on one machine.

    Attributes:
        model: the machine's own prediction for that target and draft (nothing fitted).
        observations: one per cell, as measured.
        lines: the JSON lines behind them, same order.
    """

    model: ForwardModel
    observations: list[Observation]
    lines: list[dict[str, Any]]

    def by_text(self) -> list[Cells]:
        """Apart by data set and temperature, where the acceptance is a trained pair's own."""
        texts: dict[Any, list[int]] = defaultdict(list)
        for index, line in enumerate(self.lines):
            texts[line.get("data"), line.get("temperature")].append(index)
        return [
            Cells(self.model, [self.observations[i] for i in group], [self.lines[i] for i in group])
            for group in texts.values()
        ]


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


def load_cells(paths: Sequence[str | Path], target: str | None = None) -> list[Cells]:
    """Group lines by target and drafter; lines of one group share the first line's machine.

    Args:
        paths: files of ``decode`` and ``trained`` lines.
        target: only its lines.

    Raises:
        ValueError: no such lines, or a line without its setup.
    """
    lines = [
        line
        for line in read_lines(paths)
        if line.get("kind") in (DECODE, TRAINED) and target in (None, line["target"])
    ]
    if not lines:
        of = f" of {target}" if target else ""
        raise ValueError(f"no decode lines{of} in {', '.join(map(str, paths))}")
    return group_cells(lines)


def group_cells(lines: Iterable[dict[str, Any]]) -> list[Cells]:
    """Lines as cells, one group per target, drafter and format of the weights of each."""
    groups: dict[tuple[str | None, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        stored = [line.get(name) or PLAIN for name in ("weight_format", "draft_format")]
        groups[line["target"], line.get("drafter"), *stored].append(line)
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

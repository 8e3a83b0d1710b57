"""Decode measurements as the performance model sees them: setups (machine, specs) and cells."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.gguf.contents import PLAIN
from bench.measure.fields import whole_lines
from decoder.perf_model.forward_model import ForwardModel
from decoder.perf_model.hardware.machine import Machine
from decoder.perf_model.model_spec import ModelSpec
from decoder.perf_model.observations import Observation

# Kinds of line that hold a cell: of imposed acceptance, and of a trained pair on a data set.
DECODE, TRAINED = "decode", "trained"


class Setup(NamedTuple):
    """What cells that one model describes have in common; lines lack what was not there yet."""

    target: str | None
    drafter: str | None
    target_files: str | None
    draft_files: str | None
    weight_format: str
    draft_format: str
    offload_budget: float | None
    ranks: int
    parallel: str | None
    dtype: str | None
    device: str | None
    threads: int | None


def setup_of(line: dict[str, Any]) -> Setup:
    """How a line's target ran, and where."""
    env = line.get("env", {})
    return Setup(
        line.get("target"),
        line.get("drafter"),
        line.get("target_files"),
        line.get("draft_files"),
        line.get("weight_format") or PLAIN,
        line.get("draft_format") or PLAIN,
        line.get("offload_budget"),
        line.get("ranks") or 1,
        line.get("parallel"),
        line.get("model_dtype"),
        env.get("device"),
        env.get("threads"),
    )


def apart(line: dict[str, Any]) -> str:
    """In words, where a target is not in one process's memory as a whole; else nothing."""
    setup = setup_of(line)
    words = [] if setup.offload_budget is None else [f"offload {setup.offload_budget:g}"]
    words += [f"{setup.ranks} ranks {setup.parallel}"] if setup.ranks > 1 else []
    return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Cells:
    """All cells of one target and drafter, run one way on one machine.

    Attributes:
        model: the machine's own prediction for that target and draft (nothing fitted).
        observations: one per cell, as measured.
        lines: the JSON lines behind them, same order.
    """

    model: ForwardModel
    observations: list[Observation]
    lines: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The target, and where and in what numbers it ran."""
        setup = setup_of(self.lines[0])
        files = (setup.target_files, setup.draft_files)
        return ", ".join(filter(None, (self.model.target.name, *files, setup.dtype, setup.device)))

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
    """Group the lines that a model in memory describes; a group has its first line's machine.

    Lines of experts left in files and of several ranks are left out, which is said.

    Args:
        paths: files of ``decode`` and ``trained`` lines.
        target: only its lines.

    Raises:
        ValueError: no such lines, or a line without its setup.
    """
    found = [
        line
        for line in whole_lines(paths)
        if line.get("kind") in (DECODE, TRAINED) and target in (None, line["target"])
    ]
    lines = [line for line in found if not apart(line)]
    if len(lines) < len(found):
        words = "; ".join(sorted({apart(line) for line in found} - {""}))
        left = f"{len(found) - len(lines)} of {len(found)} lines left out"
        print(f"{left}, the model is of a target in memory: {words}", file=sys.stderr)
    if not lines:
        of = f" of {target}" if target else ""
        raise ValueError(f"no decode lines{of} in {', '.join(map(str, paths))}")
    return group_cells(lines)


def group_cells(lines: Iterable[dict[str, Any]]) -> list[Cells]:
    """Lines as cells, one group per ``Setup``."""
    groups: dict[Setup, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[setup_of(line)].append(line)
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

"""Lines of a trained pair beside the paper's: peaks over batches, and what drafts came to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from decoder.perf_model.paper_tables import paper_cells

Line = dict[str, Any]
PAPER_TARGET, PAPER_MACHINE = "qwen2-57b-a14b", "2xa800"


class Run(NamedTuple):
    """Whose lines belong together."""

    target: str
    drafter: str
    device: str
    target_files: str | None
    draft_files: str | None

    @property
    def pair(self) -> str:
        """Its name, and its files' where it is one of several of that name."""
        return ", ".join(filter(None, (self.target, self.target_files, self.draft_files)))


class Row(NamedTuple):
    """One data set, temperature and draft length.

    Attributes:
        alpha: drafts accepted of those decided on, over all batches.
        sigma: emitted of the tokens possible, over all batches.
        batch: where the speedup is highest; the columns that follow are of this batch.
        predicted: speedup at the measured sigma, with nothing fitted.
        paper_sigma, paper_speedup: of the paper's cell, whose batch is not given; None where it has
            none.
    """

    data: str
    temperature: int
    gamma: int
    alpha: float | None
    sigma: float
    batch: int
    speedup: float
    predicted: float
    target_efficiency: float
    paper_sigma: float | None
    paper_speedup: float | None


def runs_of(lines: Iterable[Line]) -> dict[Run, list[Line]]:
    """``trained`` lines by ``Run``; of a cell measured again, the last."""
    runs: dict[Run, dict[tuple[Any, ...], Line]] = defaultdict(dict)
    for line in lines:
        cell = tuple(line[name] for name in ("data", "temperature", "gamma", "batch"))
        files = (line.get("target_files"), line.get("draft_files"))
        run = Run(line["target"], line["drafter"], line["env"]["device"], *files)
        runs[run][cell] = line
    return {run: [cells[key] for key in sorted(cells)] for run, cells in runs.items()}


def rows_of(lines: Iterable[Line], hardware: str = PAPER_MACHINE) -> list[Row]:
    """The table of one run: a row per data set, temperature and draft length.

    Args:
        lines: ``trained`` lines of one run.
        hardware: the machine of the paper's cells.
    """
    paper = {
        (cell.dataset, cell.temperature, cell.gamma): cell
        for cell in paper_cells()
        if (cell.target, cell.machine) == (PAPER_TARGET, hardware)
    }
    groups: dict[tuple[str, int, int], list[Line]] = defaultdict(list)
    for line in lines:
        groups[line["data"], line["temperature"], line["gamma"]].append(line)
    rows = []
    for place, cells in sorted(groups.items()):
        best = max(cells, key=lambda line: line["speedup"])
        beside = paper.get(place)
        rows.append(
            Row(
                *place,
                alpha=_alpha(cells),
                sigma=_mean_over_rows(cells, "sigma"),
                batch=best["batch"],
                speedup=best["speedup"],
                predicted=best["predicted_speedup"],
                target_efficiency=best["target_efficiency"],
                paper_sigma=beside.sigma if beside else None,
                paper_speedup=beside.speedup if beside else None,
            )
        )
    return rows


def _alpha(cells: list[Line]) -> float | None:
    decided = sum(line["decided"] for line in cells)
    accepted = sum(line["alpha"] * line["decided"] for line in cells if line["decided"])
    return accepted / decided if decided else None


def _mean_over_rows(cells: list[Line], name: str) -> float:
    return sum(line[name] * line["batch"] for line in cells) / sum(x["batch"] for x in cells)

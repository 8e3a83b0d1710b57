"""``bench fit``: both performance models on about 21 cells, judged on those they did not see."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measure.record import Recorder, environment
from bench.runs.cells import Cells, load_cells
from decoder.perf_model.fit_report import ErrorSummary, evaluate
from decoder.perf_model.forward_fit import ImprovedFit, fit_improved, predict_speedup, sensitivities
from decoder.perf_model.observations import (
    Observation,
    d_optimal_indices,
    paper_order,
    spread_indices,
    stride_indices,
)
from decoder.perf_model.paper_model import PaperFit, fit_paper, paper_bounds
from decoder.perf_model.profile import Profile

Predict = Callable[[Observation], float]
DESIGNS = ("stride", "spread", "d-optimal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench fit``."""
    parser.add_argument("lines", nargs="+", type=Path, help="JSONL of bench decode")
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--design", choices=DESIGNS, default="d-optimal", help="which cells to fit")
    parser.add_argument("--profile", type=Path, help="write the improved fit for the controller")
    parser.add_argument("--out", help="append JSON lines to this file")


def run(args: argparse.Namespace) -> None:
    """Fit each target of the lines; print errors, warnings and the worst held-out cells."""
    groups = load_cells(args.lines)
    if args.profile and len(groups) > 1:
        names = ", ".join(group.model.target.name for group in groups)
        raise ValueError(f"a profile is of one target, the lines hold {names}")
    for cells in groups:
        fits = fit_cells(cells, args.points, args.design)
        _print(cells, fits, args)
        if args.profile:
            fits.profile(cells).save(args.profile)
            print(args.profile)


class Fits:
    """The two fits of one target and their errors on held-out cells."""

    def __init__(self, cells: Cells, chosen: list[int], paper: PaperFit | None) -> None:
        ordered = paper_order(cells.observations)
        self.fitted = [ordered[i] for i in chosen]
        self.held_out = [o for i, o in enumerate(ordered) if i not in set(chosen)]
        self.paper = paper
        self.improved: ImprovedFit = fit_improved(cells.model, self.fitted)
        self.zero: Predict = lambda o: predict_speedup(cells.model, o)

    def predictors(self) -> dict[str, Predict]:
        """Model name -> predicted speedup of a cell."""
        named: dict[str, Predict] = {"improved": self.improved.predict, "zero": self.zero}
        return ({"paper": self.paper.predict} if self.paper else {}) | named

    def errors(self) -> dict[str, ErrorSummary]:
        """Relative errors on the cells that no fit saw."""
        return {name: evaluate(p, self.held_out) for name, p in self.predictors().items()}

    def profile(self, cells: Cells) -> Profile:
        """What the controller and the planner load."""
        return Profile.from_fit(
            self.improved,
            held_out=evaluate(self.improved.predict, self.held_out),
            context=max(o.context for o in cells.observations),
            paper=self.paper.model if self.paper else None,
            environment=environment(),
        )


def fit_cells(cells: Cells, points: int, design: str) -> Fits:
    """Choose ``points`` cells by ``design`` and fit both models on them."""
    ordered = paper_order(cells.observations)
    if design == "stride":
        chosen = stride_indices(len(ordered), points)
    elif design == "spread":
        chosen = spread_indices(ordered, points)
    else:
        chosen = d_optimal_indices(sensitivities(cells.model, ordered), points)
    moe = cells.model.target.moe
    if moe is None:  # the paper's model has no dense form
        return Fits(cells, chosen, None)
    slowest = max((o.reject_time or 0.0) for o in ordered) or cells.model.machine.launch
    machine, target = cells.model.machine, cells.model.target
    paper = fit_paper(
        [ordered[i] for i in chosen],
        paper_bounds(target, cells.model.draft, machine, slowest),
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        ridge_point=machine.ridge_point(cells.model.dtype),
    )
    return Fits(cells, chosen, paper)


def record_errors(
    recorder: Recorder, cells: Cells, fits: Fits, design: str
) -> dict[str, ErrorSummary]:
    """A ``fit`` line for each model's errors on held-out cells, which are returned."""
    errors = fits.errors()
    for model, error in errors.items():
        recorder.write(
            "fit",
            target=cells.model.target.name,
            model=model,
            design=design,
            points=len(fits.fitted),
            error=error.to_json(),
        )
    return errors


def _print(cells: Cells, fits: Fits, args: argparse.Namespace) -> None:
    console = Console()
    name = cells.model.target.name
    table = Table(title=f"{name}: {len(fits.fitted)} cells fitted ({args.design})")
    for head in ("model", "held out", "median", "p90", "worst", "MSE"):
        table.add_column(head, justify="right")
    for model, error in record_errors(Recorder(args.out), cells, fits, args.design).items():
        table.add_row(
            model,
            str(error.count),
            *(f"{100 * e:.1f} %" for e in (error.median, error.p90, error.worst)),
            f"{error.mse:.4f}",
        )
    console.print(table)
    for warning in _warnings(fits):
        console.print(f"[yellow]{warning}")
    console.print(_residual_table(fits))


def _warnings(fits: Fits) -> list[str]:
    found: list[Any] = [("improved", fits.improved.identifiability.warning)]
    if fits.paper:
        found.append(("paper", fits.paper.identifiability.warning))
    return [f"{model}: {warning}" for model, warning in found if warning]


def _residual_table(fits: Fits, rows: int = 8) -> Table:
    """The held-out cells on which the improved model errs most."""
    predict = fits.improved.predict
    error = lambda o: abs(predict(o) / o.speedup - 1)
    worst = sorted(fits.held_out, key=error, reverse=True)[:rows]
    table = Table(title="largest held-out residuals of the improved model")
    for head in ("K", "B", "gamma", "measured", "predicted", "error"):
        table.add_column(head, justify="right")
    for o in worst:
        table.add_row(
            str(o.top_k or "-"),
            str(o.batch),
            str(o.gamma),
            f"{o.speedup:.2f}",
            f"{predict(o):.2f}",
            f"{100 * error(o):.1f} %",
        )
    return table

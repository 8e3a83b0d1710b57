"""``bench fit``: both performance models on about 21 cells, judged on those they did not see."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.measure.record import Recorder
from bench.runs.cells import Cells, load_cells
from bench.runs.fitting import DESIGNS, Fits, fit_cells, record_errors
from decoder.builtin import BUILTIN

WORST = 8  # held-out cells that are listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench fit``."""
    parser.add_argument("lines", nargs="+", type=Path, help="JSONL of bench decode or paper")
    parser.add_argument("--preset", choices=BUILTIN, help="only the lines of this trained pair")
    parser.add_argument("--points", type=int, default=21)
    parser.add_argument("--design", choices=DESIGNS, default="d-optimal", help="which cells to fit")
    parser.add_argument("--profile", type=Path, help="write the improved fit for the controller")
    parser.add_argument("--out", help="append JSON lines to this file")


def run(args: argparse.Namespace) -> None:
    """Fit each target of the lines; print errors, warnings and the worst held-out cells."""
    groups = load_cells(args.lines, args.preset)
    if args.profile and len(groups) > 1:
        names = "; ".join(group.name for group in groups)
        raise ValueError(f"a profile is of one target run one way, the lines hold {names}")
    for cells in groups:
        fits = fit_cells(cells, args.points, args.design)
        _print(cells, fits, args)
        if args.profile:
            fits.profile(cells).save(args.profile)
            print(args.profile)


def _print(cells: Cells, fits: Fits, args: argparse.Namespace) -> None:
    console = Console()
    table = Table(title=f"{cells.name}: {len(fits.fitted)} cells fitted ({args.design})")
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
    for warning in fits.warnings():
        console.print(f"[yellow]{warning}")
    console.print(_residual_table(fits))


def _residual_table(fits: Fits) -> Table:
    """The held-out cells on which the improved model errs most."""
    predict = fits.improved.predict
    error = lambda o: abs(predict(o) / o.speedup - 1)
    worst = sorted(fits.held_out, key=error, reverse=True)[:WORST]
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

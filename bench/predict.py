"""``bench predict``: a saved profile (or a machine alone) against measured cells."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cells import load_cells
from bench.record import Recorder
from decoder.perf_model.fit_report import evaluate
from decoder.perf_model.improved_fit import predict_speedup
from decoder.perf_model.profile import load_profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench predict``."""
    parser.add_argument("lines", nargs="+", type=Path, help="JSONL of bench decode")
    parser.add_argument("--profile", type=Path, help="default: the machine alone, nothing fitted")
    parser.add_argument("--out", help="append JSON lines to this file")


def run(args: argparse.Namespace) -> None:
    """Print measured and predicted speedup per cell, the errors, and the best γ per batch."""
    console, recorder = Console(), Recorder(args.out)
    for cells in load_cells(args.lines):
        model = load_profile(args.profile).model if args.profile else cells.model
        if args.profile:
            load_profile(args.profile).check_target(cells.model.target)
        table = Table(title=f"{cells.model.target.name}: measured and predicted speedup")
        for head in ("K", "B", "gamma", "measured", "predicted"):
            table.add_column(head, justify="right")
        for o in cells.observations:
            predicted = predict_speedup(model, o)
            table.add_row(
                str(o.top_k or "-"),
                str(o.batch),
                str(o.gamma),
                f"{o.speedup:.2f}",
                f"{predicted:.2f}",
            )
            recorder.write("predict", **o.to_json(), predicted=predicted)
        console.print(table)
        error = evaluate(partial(predict_speedup, model), cells.observations)
        console.print(f"relative error: median {error.median:.1%}, p90 {error.p90:.1%}")

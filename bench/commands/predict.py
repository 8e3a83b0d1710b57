"""``bench predict``: a saved profile (or a machine alone) against measured cells."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.measure.record import Recorder
from bench.runs.cells import Cells, load_cells
from bench.runs.fitting import Choice, best_gammas
from decoder.builtin import BUILTIN
from decoder.perf_model.fit_report import evaluate
from decoder.perf_model.forward_fit import predict_speedup
from decoder.perf_model.profile import load_profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench predict``."""
    parser.add_argument("lines", nargs="+", type=Path, help="JSONL of bench decode or paper")
    parser.add_argument("--preset", choices=BUILTIN, help="only the lines of this trained pair")
    parser.add_argument("--profile", type=Path, help="default: the machine alone, nothing fitted")
    parser.add_argument("--out", help="append JSON lines to this file")


def run(args: argparse.Namespace) -> None:
    """Print measured and predicted speedup per cell, the errors, and the best gamma per batch."""
    console, recorder = Console(), Recorder(args.out)
    for cells in load_cells(args.lines, args.preset):
        model = load_profile(args.profile).model if args.profile else cells.model
        if args.profile:
            load_profile(args.profile).check_target(cells.model.target)
        table = Table(title=f"{cells.name}: measured and predicted speedup")
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
        for part in cells.by_text():
            choices = best_gammas(partial(predict_speedup, model), part.observations)
            if choices:
                _print_choices(console, choices, _text(part))
                recorder.write("best-gamma", choices=[choice._asdict() for choice in choices])


def _text(cells: Cells) -> str:
    """What was decoded, where cells say it."""
    line = cells.lines[0]
    return f", {line['data']}, T = {line['temperature']}" if "data" in line else ""


def _print_choices(console: Console, choices: Sequence[Choice], text: str) -> None:
    table = Table(title=f"best gamma{text}")
    for head in ("K", "B", "measured", "predicted", "speedup lost"):
        table.add_column(head, justify="right")
    for choice in choices:
        names = (str(choice.top_k or "-"), str(choice.batch), str(choice.measured))
        table.add_row(*names, str(choice.predicted), f"{choice.loss:.1%}")
    console.print(table)

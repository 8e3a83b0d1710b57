"""The page's section on a trained pair: its table beside the paper's."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from bench.page.tables import text
from bench.paper.beside import PAPER_MACHINE, PAPER_TARGET, Row, Run, rows_of, runs_of
from bench.runs.cells import TRAINED

HEADS = (
    *("data", "T", "γ", "α", "σ", "paper's σ", "speedup", "at B", "predicted"),
    *("target efficiency", "paper's speedup"),
)


def section(lines: Iterable[dict[str, Any]]) -> str:
    """A table per pair, drafter and device; nothing without ``trained`` lines."""
    runs = runs_of(line for line in lines if line.get("kind") == TRAINED)
    if not runs:
        return ""
    tables = "".join(_table(run, rows_of(cells)) for run, cells in runs.items())
    return (
        "<section><h2>A real model</h2><p>Its draft's own proposals, verified: each row at the "
        "batch where speculative over autoregressive decoding is highest, the prediction at the "
        f"σ measured there with nothing fitted; the paper's rows are {escape(PAPER_TARGET)} on "
        f"{escape(PAPER_MACHINE)}.</p>{tables}</section>"
    )


def _table(run: Run, rows: list[Row]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADS)
    body = "".join(
        f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(row))}</tr>" for row in rows
    )
    caption = escape(f"{run.pair}, {run.drafter} drafter, {run.device}")
    return (
        f'<h3>{caption}</h3><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def _cells(row: Row) -> list[str]:
    number = lambda value: "" if value is None else f"{value:.2f}"
    times = lambda value: "" if value is None else f"{value:.2f}×"
    return [
        escape(row.data),
        text(row.temperature),
        text(row.gamma),
        *map(number, (row.alpha, row.sigma, row.paper_sigma)),
        times(row.speedup),
        text(row.batch),
        times(row.predicted),
        number(row.target_efficiency),
        times(row.paper_speedup),
    ]

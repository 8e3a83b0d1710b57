"""The few numbers that a page begins with, chosen from the kinds of line that are there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.page.runs import largest_run
from bench.pictures.formats import PLAIN, stored_as
from bench.pictures.style import of_acceptance
from bench.runs.cells import DECODE, TRAINED, apart

Line = dict[str, Any]
COUNT = 4


@dataclass(frozen=True, slots=True)
class Number:
    """One number of the headline.

    Attributes:
        value: as it is shown, with its unit.
        words: what it is, in a sentence without a full stop.
        processors: where it was measured.
        commands: what measured it.
    """

    value: str
    words: str
    processors: tuple[str, ...]
    commands: tuple[str, ...]


def headline(lines: list[Line]) -> list[Number]:
    """The first ``COUNT`` numbers for which there are lines, most telling first."""
    found = [number for find in FINDERS if (number := find(lines))]
    return found[:COUNT]


def processor(line: Line) -> str:
    """Device and instruction set of a line."""
    env = line["env"]
    return f"{env['device']}, {env['isa']}" if env.get("isa") else env["device"]


def _number(value: str, words: str, lines: Iterable[Line]) -> Number:
    environments = [line for line in lines if "env" in line]
    return Number(
        value,
        words,
        tuple(dict.fromkeys(map(processor, environments))),
        tuple(dict.fromkeys(line["env"]["command"] for line in environments)),
    )


def _of_kind(lines: list[Line], kind: str) -> list[Line]:
    return [line for line in lines if line.get("kind") == kind]


def _speedup(lines: list[Line]) -> Number | None:
    """The best cell: of a trained pair where there is one, else of imposed acceptance."""
    cells = _of_kind(lines, TRAINED) or _of_kind(lines, DECODE)
    if not cells:
        return None
    best = max(cells, key=lambda line: line["speedup"])
    sparsity = f", K = {best['top_k']}" if best.get("top_k") else ""
    where = f"{best['target']}{sparsity}, B = {best['batch']}, γ = {best['gamma']}"
    if "data" in best:
        where += f", {best['data']}, T = {best['temperature']:g}, {best['drafter']} drafter"
    if apart(best):
        where += f", {apart(best)}"
    words = (
        f"speculative over autoregressive decoding at its best: {where}, σ = {best['sigma']:.2f}"
    )
    return _number(f"{best['speedup']:.1f}×", words, [best])


def _against_transformers(lines: list[Line]) -> Number | None:
    """Our autoregressive loop over transformers' generate, at the largest batch both ran."""
    pairs = [
        line
        for line in _of_kind(lines, "generate")
        if line["variant"] == "ours" and "transformers" in line["times_faster_than"]
    ]
    if not pairs:
        return None
    line = max(pairs, key=lambda line: line["B"])
    words = (
        f"our autoregressive loop over transformers' generate: {line['target']}, B = {line['B']}"
    )
    return _number(f"{line['times_faster_than']['transformers']:.1f}×", words, [line])


def _against_grouped(lines: list[Line]) -> Number | None:
    """The expert layer over grouped_mm; a peer timed with the host's gaps in it does not count."""
    points = _with_grouped(lines)
    if not points:
        return None
    ratios = [line["ratio"]["grouped_mm"] for line in points]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    words = (
        f"expert layer over transformers' grouped_mm: geometric mean of {len(ratios)} points, "
        f"the lowest {min(ratios):.2f}×"
    )
    return _number(f"{mean:.1f}×", words, points)


def _share_of_roofline(lines: list[Line]) -> Number | None:
    """Of the points that were compared with a peer, where there are any; else of all."""
    points = _with_grouped(lines) or _of_kind(lines, "kernel")
    if not points:
        return None
    shares = [line["of_roof"] for line in points]
    words = (
        f"expert layer, share of the roofline: median of {len(shares)} points, "
        f"the lowest {min(shares):.2f}"
    )
    return _number(f"{100 * statistics.median(shares):.0f} %", words, points)


def _with_grouped(lines: list[Line]) -> list[Line]:
    """The points of one run that were compared with grouped_mm, on the same plain weights."""
    compared = [
        line
        for line in _of_kind(lines, "kernel")
        if "grouped_mm" in line["ratio"] and "grouped_mm" not in line["not_captured"]
        if stored_as(line) == PLAIN
    ]
    return largest_run(compared)


def _identical(lines: list[Line]) -> Number | None:
    """Outputs that equal the target's own, where the verifier says they do."""
    whole = [
        line
        for line in _of_kind(lines, "compare")
        if line["temperature"] == 0 or line["verifier"] == "coupled"
    ]
    runs = _of_kind(lines, "humaneval") + whole
    if not runs:
        return None
    same, all_of_them = (sum(line[key] for line in runs) for key in ("identical", "sequences"))
    texts = ", ".join(dict.fromkeys(line.get("data", "humaneval") for line in runs))
    words = f"speculative outputs that equal the target's own, {texts}, {len(runs)} settings"
    return _number(f"{same} / {all_of_them}", words, runs)


def _automatic(lines: list[Line]) -> Number | None:
    """Automatic gamma at its worst."""
    cells = _of_kind(lines, "auto")
    if not cells:
        return None
    worst = min(cells, key=lambda line: line["against_best"])
    words = (
        f"automatic γ over the best fixed one, the lowest of {len(cells)} cells: "
        f"{of_acceptance(worst)}, B = {worst['batch']}"
    )
    return _number(f"{worst['against_best']:.2f}×", words, cells)


def _fit(lines: list[Line]) -> Number | None:
    """The performance model's error on cells that it was not fitted on."""
    fits = [line for line in _of_kind(lines, "fit") if line["model"] == "improved"]
    if not fits:
        return None
    last, error = fits[-1], fits[-1]["error"]
    words = f"predicted speedup, median error on {error['count']} cells not fitted"
    return _number(f"{100 * error['median']:.1f} %", words, [last])


FINDERS: tuple[Callable[[list[Line]], Number | None], ...] = (
    _speedup,
    _against_transformers,
    _against_grouped,
    _share_of_roofline,
    _identical,
    _automatic,
    _fit,
)

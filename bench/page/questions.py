"""The questions that lines answer, each with one picture.

A folder may hold several runs of one kind: other commits, other targets, other draft lengths. A
picture shows one of them, never a mixture.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.page.runs import largest_run, runs_of
from bench.pictures import decode, engine, formats, kernels, trained
from bench.pictures.gallery import Draw
from bench.pictures.style import Lines, inline_svg
from bench.runs.cells import TRAINED, Setup, setup_of

Choose = Callable[[Lines], Lines]
# What tokens per second depend on beside who decodes: a picture is of one text and length.
TEXTS = ("target", "dtype", "alpha", "prompts", "new_tokens")


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        words: the question.
        reading: how to read its picture.
        kind: of the lines that answer it.
        draw: draws pictures, the first of which is shown.
        choose: the lines to draw.
    """

    words: str
    reading: str
    kind: str
    draw: Draw
    choose: Choose = lambda lines: lines


class Answer(NamedTuple):
    """A question and the SVG text that answers it."""

    question: Question
    picture: str


def answers(lines: Lines) -> Iterator[Answer]:
    """Every question for which there are lines, in order."""
    for question in QUESTIONS:
        chosen = question.choose([x for x in lines if x.get("kind") == question.kind])
        if not chosen:
            continue
        with tempfile.TemporaryDirectory() as scratch, inline_svg():
            drawn = question.draw(chosen, Path(scratch))
            if drawn:
                yield Answer(question, _element(drawn[0].read_text()))


def _element(svg: str) -> str:
    """The ``<svg>`` element of a file, which may then stand in HTML."""
    return svg[svg.index("<svg") :]


def _cells(lines: Lines) -> list[Lines]:
    """Decode lines of one run and setup each."""
    cells: dict[tuple[int, Setup], Lines] = defaultdict(list)
    for number, run in enumerate(runs_of(lines)):
        for line in run:
            cells[number, setup_of(line)].append(line)
    return list(cells.values())


def _most_cells(lines: Lines) -> Lines:
    return max(_cells(lines), key=len, default=[])


def _one_gamma(lines: Lines) -> Lines:
    """Of the largest run, the draft length at which it reaches most, all sparsities."""
    run = _most_cells(lines)
    if not run:
        return []
    best = max(run, key=lambda line: line["speedup"])["gamma"]
    return [line for line in run if line["gamma"] == best]


def _most_gammas(lines: Lines) -> Lines:
    """The run and sparsity measured with most draft lengths, if they are three or more."""
    choices: dict[tuple[int, int | None], Lines] = defaultdict(list)
    for number, run in enumerate(_cells(lines)):
        for line in run:
            choices[number, line["top_k"]].append(line)
    gammas = lambda run: len({line["gamma"] for line in run})
    most = max(choices.values(), key=gammas, default=[])
    return most if gammas(most) >= 3 else []


def _largest_of(*names: str) -> Choose:
    """The most lines of one run that have the same in the fields of these names."""

    def choose(lines: Lines) -> Lines:
        groups: dict[tuple[Any, ...], Lines] = defaultdict(list)
        for number, run in enumerate(runs_of(lines)):
            for line in run:
                groups[number, *map(line.get, names)].append(line)
        return max(groups.values(), key=len, default=[])

    return choose


def _compared(lines: Lines) -> Lines:
    """Layer lines beside a peer, where there are any: the others are of other questions."""
    return [line for line in lines if line["ratio"]] or lines


def _largest_gamma(lines: Lines) -> Lines:
    """Of the longest drafts measured, and the single steps they are held against."""
    longest = max((line["gamma"] for line in lines), default=0)
    return [line for line in lines if line["gamma"] in (0, longest)]


QUESTIONS = (
    Question(
        "When does speculation pay, with a real draft?",
        "Speculative over autoregressive tokens per second over the batch, a panel per data set "
        "and temperature; dashed: predicted at the σ measured, nothing fitted; dotted: the paper's "
        "best.",
        TRAINED,
        trained.draw_speedups,
    ),
    Question(
        "What is that speedup made of?",
        "How many of the tokens possible are emitted, beside the paper's (hollow), and how nearly "
        "free their verification is; dashed: predicted.",
        TRAINED,
        trained.draw_acceptance,
    ),
    Question(
        "When does speculation pay?",
        "Speculative over autoregressive tokens per second over the batch; above 1 it pays. "
        "Dashed, where there are cells enough: the performance model fitted on 21 of them.",
        "decode",
        decode.draw_speedup,
        _one_gamma,
    ),
    Question(
        "How long should drafts be?",
        "Speedup of each draft length at each batch.",
        "decode",
        decode.draw_map,
        _most_gammas,
    ),
    Question(
        "How nearly free is verification?",
        "Target efficiency: the time of one step over the time of one verification. At 1, "
        "the draft tokens ride along for nothing.",
        "decode",
        decode.draw_target_efficiency,
        largest_run,
    ),
    Question(
        "How nearly free with fewer bits per weight?",
        "Target efficiency of a model's weight formats: with fewer bytes there is less time in "
        "which draft tokens ride along.",
        "decode",
        formats.draw_model_formats,
        _largest_gamma,
    ),
    Question(
        "Does the model predict it?",
        "Predicted against measured speedup on cells that were not fitted; "
        "bands of 5\N{NO-BREAK SPACE}% and 12\N{NO-BREAK SPACE}%.",
        "decode",
        decode.draw_predicted,
        _most_cells,
    ),
    Question(
        "How many experts does a step load?",
        "Distinct experts of a layer over the tokens that enter it; dashed: independent routing.",
        "decode",
        decode.draw_activation,
        _most_cells,
    ),
    Question(
        "Does automatic γ keep up with the best fixed one?",
        "Speed of automatic γ over that of the best fixed γ, none included, known afterwards.",
        "auto",
        engine.draw_automatic,
        _largest_of("target"),
    ),
    Question(
        "How fast is it beside others?",
        "Tokens per second over the batch, same prompts, prompts' cost included.",
        "generate",
        engine.draw_tokens_per_second,
        _largest_of(*TEXTS),
    ),
    Question(
        "How near is the layer to what memory allows?",
        "Time that memory and arithmetic need at least, over the time taken; the ceilings are "
        "measured in the same rounds.",
        "kernel",
        kernels.draw_roofline_share,
        _compared,
    ),
    Question(
        "How much longer do others take for the layer?",
        "A peer's time over ours: median of the shapes, and their range.",
        "kernel",
        kernels.draw_peer_ratios,
        _compared,
    ),
    Question(
        "How nearly free is it for the layer alone?",
        "The layer's target efficiency over batch and draft length, measured and as the roofline "
        "has it.",
        "kernel",
        kernels.draw_efficiency_map,
    ),
    Question(
        "How nearly free is it for the layer with fewer bits per weight?",
        "The layer's target efficiency over the batch, a curve per weight format; dashed: as the "
        "roofline has it.",
        "kernel",
        formats.draw_layer_formats,
        _largest_gamma,
    ),
)

"""``bench paper``: the paper's tables in kind, side by side: its value, ours, the prediction.

A trained pair (``smol``, ``embedded``, or an architecture with ``--target`` and ``--draft``)
decodes HumanEval and MT-bench through its chat template, and its draft's own proposals are
verified: sigma and speedup are its own. HumanEval's functions are asked for in a question, since an
instruct model answers rather than goes on; ends of sequence are passed over, so that every row
stays live. With ``--out`` a run that was cut off goes on from the file.

An architecture without weights is built with random ones, scaled to fit the machine, and the
paper's sigma is imposed by the replay drafter while a draft of its kind really runs. Rows so made
are labelled ``random weights``: they reproduce the cost side, not the acceptance.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.measure.record import Recorder
from bench.paper.beside import Row, rows_of
from bench.paper.grid import Grid, measure_grid
from bench.paper.peak import measure_peak
from bench.runs.decode_lines import describe_subject
from bench.runs.subject import Subject
from bench.workloads.arguments import (
    add_drafting,
    add_dtype,
    add_machine,
    at_least,
    naturals,
    positives,
    refuse_ignored,
    words,
)
from bench.workloads.paper import (
    ARCHITECTURES,
    BORROWED,
    cells_beside,
    chosen_cells,
    random_pair,
)
from bench.workloads.prompts import DATA_FILES
from bench.workloads.trained import TrainedPair
from decoder.builtin import BUILTIN
from decoder.drafters.table import drafter_kind
from decoder.perf_model.paper_tables import PaperCell
from decoder.perf_model.theory import alpha_from_sigma
from decoder.sampling import VERIFIERS

RANDOM_BATCHES, TRAINED_BATCHES = "1,4,8,16,32,64,100", "1,2,4,8,16,32,64"
# The whole grid of a trained pair in 40 minutes on two cores, where a step takes 0.1 s.
RANDOM_TOKENS, TRAINED_TOKENS = 32, 48
TEXT = ("data", "T", "γ")
HEADS = ("sigma", "paper's x", "our x", "at B", "predicted x", "eff.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench paper``."""
    presets = (*ARCHITECTURES, *BUILTIN)
    parser.add_argument("--preset", choices=presets, default=presets[0])
    parser.add_argument("--hardware", default="2xa800", help="whose sigma and speedups to use")
    parser.add_argument("--datasets", default=",".join(DATA_FILES))
    parser.add_argument("--temperatures", type=naturals, default="0,1")
    parser.add_argument("--target", type=Path, help="an architecture's weights, where they are")
    parser.add_argument("--draft", type=Path, help="weights of its draft")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the parameters to build")
    parser.add_argument(
        "--batch-sizes",
        type=positives,
        help=f"default: {TRAINED_BATCHES}; of random weights {RANDOM_BATCHES}",
    )
    parser.add_argument("--gammas", type=positives, default="2,3,4")
    parser.add_argument(
        "--num-experts-per-token", type=at_least(1), help="of random weights: sparsity"
    )
    parser.add_argument(
        "--verifier", choices=VERIFIERS, default=VERIFIERS[0], help="of a trained pair at T > 0"
    )
    parser.add_argument(
        "--new-tokens",
        type=at_least(2),
        help=f"default: {TRAINED_TOKENS}; of random weights {RANDOM_TOKENS}",
    )
    parser.add_argument("--prompt-tokens", type=at_least(1), default=32, help="of random prompts")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="repetitions of each run")
    add_drafting(parser)
    add_dtype(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> None:
    """Measure every wanted row of the preset; print the table and append lines."""
    if unknown := set(words(args.datasets)) - DATA_FILES.keys():
        known = ", ".join(DATA_FILES)
        raise ValueError(f"--datasets must be of {known}, got {', '.join(sorted(unknown))}")
    recorder = Recorder(args.out, args.device)
    pair = _trained_pair(args)
    if pair:
        _run_trained(args, pair, recorder)
    else:
        _run_random(args, recorder)


def _trained_pair(args: argparse.Namespace) -> TrainedPair | None:
    if args.preset in BUILTIN:
        refuse_ignored(args, f"the pair {args.preset}", "target", "draft")
        return TrainedPair.of_flags(args)
    if not args.target:
        refuse_ignored(args, "an architecture without --target", "draft", "drafter")
        return None
    drafter = drafter_kind(args.drafter, args.draft).name
    return TrainedPair(args.preset, drafter, args.target, args.draft)


def _run_trained(args: argparse.Namespace, pair: TrainedPair, recorder: Recorder) -> None:
    grid = Grid(
        datasets=words(args.datasets),
        temperatures=args.temperatures,
        batches=args.batch_sizes or positives(TRAINED_BATCHES),
        gammas=args.gammas,
        verifier=args.verifier,
        new_tokens=args.new_tokens or TRAINED_TOKENS,
        repetitions=args.rounds,
        prompts=args.prompts_dir,
    )
    lines = measure_grid(pair, grid, recorder, getattr(torch, args.dtype), args.device)
    table = _table(f"{pair.name}, {pair.drafter} drafter", args.hardware, (*TEXT, "α", *HEADS))
    for row in rows_of(lines, args.hardware):
        table.add_row(*_trained_row(row))
    Console(width=110).print(table)


def _run_random(args: argparse.Namespace, recorder: Recorder) -> None:
    target, draft = random_pair(
        args.preset,
        getattr(torch, args.dtype),
        args.device,
        scale=args.scale,
        top_k=args.num_experts_per_token,
    )
    label = f"random weights, scale {args.scale:g}"
    table = _table(f"{args.preset} ({label})", args.hardware, (*TEXT, *HEADS))
    setup: dict[str, Any] = {}
    rows = cells_beside(args.preset, args.hardware)
    chosen = (words(args.datasets), args.temperatures, args.gammas)
    batches = args.batch_sizes or positives(RANDOM_BATCHES)
    for cell in chosen_cells(rows, *chosen):
        alpha = float(alpha_from_sigma(cell.sigma, cell.gamma))
        subject = Subject(target, draft, alpha, cell.temperature, verifier="coupled")
        setup = setup or describe_subject(subject, args.device)
        best = measure_peak(
            subject,
            args.preset if args.scale == 1.0 else f"{args.preset}@{args.scale:g}",
            tqdm(batches, desc=f"γ={cell.gamma}", disable=None, leave=False),
            cell.gamma,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens or RANDOM_TOKENS,
            repetitions=args.rounds,
            setup=setup,
            recorder=recorder,
        )
        recorder.write("paper", **_fields(args, cell, label), **best)
        table.add_row(*_random_row(cell, best))
    Console(width=110).print(table)


def _table(title: str, hardware: str, heads: tuple[str, ...]) -> Table:
    table = Table(title=f"{title}; the paper's machine: {hardware}")
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _fields(args: argparse.Namespace, cell: PaperCell, label: str) -> dict[str, Any]:
    return {
        "preset": args.preset,
        "label": label,
        "hardware": cell.machine,
        "data": cell.dataset,
        "temperature": cell.temperature,
        "gamma": cell.gamma,
        "paper_sigma": cell.sigma,
        "paper_speedup": cell.speedup,
        "borrowed_from": BORROWED.get(args.preset),
    }


def _random_row(cell: PaperCell, best: dict[str, Any]) -> list[str]:
    return [
        cell.dataset,
        f"{cell.temperature:g}",
        str(cell.gamma),
        f"{best['sigma']:.2f} / {cell.sigma:.2f}",
        f"{cell.speedup:.2f}",
        f"{best['speedup']:.2f}",
        str(best["batch"]),
        f"{best['predicted_speedup']:.2f}",
        f"{best['target_efficiency']:.2f}",
    ]


def _trained_row(row: Row) -> list[str]:
    number = lambda value: "-" if value is None else f"{value:.2f}"
    return [
        row.data,
        f"{row.temperature:g}",
        str(row.gamma),
        number(row.alpha),
        f"{number(row.sigma)} / {number(row.paper_sigma)}",
        number(row.paper_speedup),
        number(row.speedup),
        str(row.batch),
        number(row.predicted),
        number(row.target_efficiency),
    ]

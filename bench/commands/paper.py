"""``bench paper``: the paper's tables in kind, side by side: its value, ours, the prediction.

Without weights on disk the architecture is built with random weights, scaled to fit the machine,
and the paper's sigma is imposed by the replay drafter while a draft of its kind really runs.
Rows so made are labelled ``random weights``: they reproduce the cost side, not the acceptance. With
weights (and for the embedded pair) the data sets' prompts and the draft's own proposals are used.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.commands.arguments import numbers
from bench.measure.record import Recorder
from bench.runs.decode import Subject
from bench.runs.decode_lines import describe_subject
from bench.runs.paper import measure_peak
from bench.workloads.paper import (
    BORROWED,
    DATA_SETS,
    PRESETS,
    cells_beside,
    chosen_cells,
    data_prompts,
    preset_models,
)
from decoder.perf_model.paper_tables import PaperCell
from decoder.perf_model.theory import alpha_from_sigma


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench paper``."""
    parser.add_argument("--preset", choices=PRESETS, default=PRESETS[0])
    parser.add_argument("--hardware", default="2xa800", help="whose sigma and speedups to use")
    parser.add_argument("--data", choices=tuple(DATA_SETS), help="default: both")
    parser.add_argument("--temperature", type=int, choices=(0, 1), help="default: both")
    parser.add_argument("--target", type=Path, help="weights of the preset, where they are on disk")
    parser.add_argument("--draft", type=Path, help="weights of its draft")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the parameters to build")
    parser.add_argument("--batch-sizes", default="1,4,8,16,32,64,100")
    parser.add_argument("--gammas", default="2,3,4")
    parser.add_argument("--num-experts-per-token", type=int, help="sparsity ablation")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--out", help="append JSON lines to this file")


def run(args: argparse.Namespace) -> None:
    """Measure every wanted row of the preset; print the table and append lines."""
    if args.threads:
        torch.set_num_threads(args.threads)
    recorder = Recorder(args.out, args.device)
    target, draft = preset_models(
        args.preset,
        getattr(torch, args.dtype),
        args.device,
        target=args.target,
        draft=args.draft,
        scale=args.scale,
        top_k=args.num_experts_per_token,
    )
    trained = args.preset == "embedded" or bool(args.target and args.draft)
    label = "trained weights" if trained else f"random weights, scale {args.scale:g}"
    table = Table(title=f"{args.preset} ({label}); the paper's machine: {args.hardware}")
    for head in ("data", "T", "γ", "sigma", "paper's x", "our x", "at B", "predicted x", "eff."):
        table.add_column(head, justify="right")
    setup: dict[str, Any] = {}
    rows = cells_beside(args.preset, args.hardware)
    for cell in chosen_cells(rows, args.data, args.temperature, numbers(args.gammas)):
        alpha = None if trained else float(alpha_from_sigma(cell.sigma, cell.gamma))
        prompts = data_prompts(args.preset, args.target, cell.dataset) if trained else None
        subject = Subject(target, draft, alpha, cell.temperature, prompts)
        setup = setup or describe_subject(subject, args.device)
        best = measure_peak(
            subject,
            args.preset if args.scale == 1.0 else f"{args.preset}@{args.scale:g}",
            tqdm(numbers(args.batch_sizes), desc=f"γ={cell.gamma}", disable=None, leave=False),
            cell.gamma,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            repetitions=args.rounds,
            setup=setup,
            recorder=recorder,
        )
        recorder.write("paper", **_fields(args, cell, label), **best)
        table.add_row(*_row(cell, best))
    Console(width=110).print(table)


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


def _row(cell: PaperCell, best: dict[str, Any]) -> list[str]:
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

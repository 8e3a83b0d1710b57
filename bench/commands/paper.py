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
from bench.commands.decode import fields, setup_for
from bench.measure.record import Recorder
from bench.runs.cells import group_cells
from bench.runs.decode import Subject, measure_batch
from bench.workloads.models import load_model, random_model
from bench.workloads.prompts import load_prompts
from bench.workloads.scaling import random_eagle, scaled_config
from decoder.embedded import load_pair, target_path
from decoder.perf_model.forward_fit import predict_speedup
from decoder.perf_model.observations import Observation
from decoder.perf_model.paper_tables import PaperCell, paper_cells
from decoder.perf_model.presets import PAPER_PAIRS
from decoder.perf_model.theory import alpha_from_sigma

PRESETS = ("qwen2-57b-a14b", "mixtral-8x7b", "qwen3-30b-a3b", "opt-30b", "embedded")
# Rows without a table in the paper: the sigma under which their cost is measured is borrowed.
BORROWED = dict.fromkeys(("qwen3-30b-a3b", "opt-30b", "embedded"), "qwen2-57b-a14b")
DRAFTS = PAPER_PAIRS | {"qwen3-30b-a3b": "qwen2-0.5b"}
DATA_SETS = {"humaneval": "humaneval", "mt_bench": "mt-bench"}


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
    target, draft = _models(args)
    real = args.preset == "embedded" or (args.target and args.draft)
    label = "trained weights" if real else f"random weights, scale {args.scale:g}"
    table = Table(title=f"{args.preset} ({label}); the paper's machine: {args.hardware}")
    for head in ("data", "T", "γ", "sigma", "paper's x", "our x", "at B", "predicted x", "eff."):
        table.add_column(head, justify="right")
    setup: dict[str, Any] = {}
    for cell in _cells(args):
        alpha = None if real else float(alpha_from_sigma(cell.sigma, cell.gamma))
        prompts = _prompts(args, DATA_SETS[cell.dataset]) if real else None
        subject = Subject(target, draft, alpha, cell.temperature, prompts)
        setup = setup or setup_for(subject, args.device)
        best = _peak(args, subject, cell.gamma, setup, recorder)
        recorder.write(
            "paper",
            preset=args.preset,
            label=label,
            hardware=cell.machine,
            data=cell.dataset,
            temperature=cell.temperature,
            gamma=cell.gamma,
            paper_sigma=cell.sigma,
            paper_speedup=cell.speedup,
            borrowed_from=BORROWED.get(args.preset),
            **best,
        )
        table.add_row(
            cell.dataset,
            f"{cell.temperature:g}",
            str(cell.gamma),
            f"{best['sigma']:.2f} / {cell.sigma:.2f}",
            f"{cell.speedup:.2f}",
            f"{best['speedup']:.2f}",
            str(best["batch"]),
            f"{best['predicted_speedup']:.2f}",
            f"{best['target_efficiency']:.2f}",
        )
    Console(width=110).print(table)


def _cells(args: argparse.Namespace) -> list[PaperCell]:
    """The paper's cells to set beside this preset.

    Raises:
        ValueError: the paper has none on that hardware.
    """
    target = BORROWED.get(args.preset, args.preset)
    rows = [c for c in paper_cells() if (c.target, c.machine) == (target, args.hardware)]
    if not rows:
        known = sorted({c.machine for c in paper_cells() if c.target == target})
        raise ValueError(f"the paper has {target} on {', '.join(known)}, not on {args.hardware!r}")
    return [
        c
        for c in rows
        if args.data in (None, c.dataset)
        and args.temperature in (None, c.temperature)
        and c.gamma in numbers(args.gammas)
    ]


def _peak(
    args: argparse.Namespace,
    subject: Subject,
    gamma: int,
    setup: dict[str, Any],
    recorder: Recorder,
) -> dict[str, Any]:
    """Measure every batch, write its ``decode`` line, and return the one with the best speedup."""
    lines = []
    for batch in tqdm(numbers(args.batch_sizes), desc=f"γ={gamma}", disable=None, leave=False):
        pairs = measure_batch(
            subject,
            batch,
            [gamma],
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            repetitions=args.rounds,
        )
        name = args.preset if args.scale == 1.0 else f"{args.preset}@{args.scale:g}"
        lines += [
            recorder.write("decode", **fields(name, subject, pair), **setup) for pair in pairs
        ]
    if not lines:
        raise ValueError(f"no full round in --new-tokens {args.new_tokens}: expected more")
    best = max(lines, key=lambda line: line["speedup"])
    predicted = predict_speedup(group_cells(lines)[0].model, Observation.from_json(best))
    kept = ("batch", "sigma", "speedup", "target_efficiency", "identical")
    return {key: best[key] for key in kept} | {"predicted_speedup": predicted}


def _prompts(args: argparse.Namespace, data: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    path = target_path() if args.preset == "embedded" else args.target
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [tokenizer(text)["input_ids"] for text in load_prompts(data)]


def _models(args: argparse.Namespace) -> tuple[Any, Any]:
    dtype = getattr(torch, args.dtype)
    if args.preset == "embedded":
        model, draft, _ = load_pair(dtype)
        return model, draft
    if args.target:
        target: Any = load_model(str(args.target), dtype, args.device)
    else:
        config = scaled_config(args.preset, args.scale)
        if args.num_experts_per_token:
            config.num_experts_per_tok = args.num_experts_per_token
        target = random_model(config, dtype, args.device)
    if args.draft:
        return target, load_model(str(args.draft), dtype, args.device)
    if DRAFTS[args.preset] == "eagle":
        return target, random_eagle(target)
    config = scaled_config(DRAFTS[args.preset], args.scale)
    config.vocab_size = target.config.vocab_size
    return target, random_model(config, dtype, args.device, seed=1)

"""``bench auto``: automatic gamma against autoregressive decoding and every fixed gamma.

One engine; the replay drafter at each alpha with a real draft's cost, or, of a trained pair, its
draft's own proposals on each data set. The controller takes its
start-up profile before the first run, as the command line does. The first run is not timed, so a
timed one starts with the acceptance seen before; ``--cold`` forgets it before every run. A second
autoregressive decoder runs along: its ratio to the first is the noise of the machine.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.measure.record import Recorder
from bench.runs.automatic import Settings, measure_automatic
from bench.runs.subject import Subject
from bench.workloads.arguments import add_machine, add_pair, numbers, words
from bench.workloads.models import load_subject
from bench.workloads.prompts import DATA_FILES, prompt_tokens
from bench.workloads.trained import TrainedPair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench auto``."""
    add_pair(parser)
    parser.add_argument("--datasets", default=",".join(DATA_FILES), help="of a trained pair")
    parser.add_argument("--target", default="moe-310m", help="moe-310m, dense-310m, or a path")
    parser.add_argument("--alphas", default="0.3,0.6,0.9", help="imposed without a preset")
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32,64")
    parser.add_argument("--gammas", default="1,2,4,6", help="fixed gammas to compare with")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=16, help="most rounds per cell")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of rounds per cell")
    parser.add_argument("--cold", action="store_true", help="acceptance unknown in every run")
    parser.add_argument("--dtype", default="bfloat16")
    add_machine(parser)


def run(args: argparse.Namespace) -> None:
    """Measure every (alpha, B), print ratios, append lines to ``--out``."""
    if args.threads:
        torch.set_num_threads(args.threads)
    recorder = Recorder(args.out, args.device)
    name = args.preset or args.target
    subjects = _trained(args) if args.preset else _replayed(args)
    table = Table(title=f"{name} {args.dtype}: automatic gamma")
    heads = ("text", "B", "AR / AR", "auto / AR", "best fixed", "auto / best of all", "why")
    for head in heads:
        table.add_column(head, justify="right")
    settings = Settings(
        gammas=numbers(args.gammas),
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        budget_s=args.budget,
        cold=args.cold,
    )
    for batch in tqdm(numbers(args.batch_sizes), desc="B", disable=None):
        for of, subject in subjects.items():
            line = measure_automatic(subject, batch, settings)
            place = {"data": of} if args.preset else {}
            recorder.write("auto", target=name, alpha=subject.alpha, **place, batch=batch, **line)
            table.add_row(
                of,
                str(batch),
                f"{line['noise']:.2f}",
                f"{line['against_ar']:.2f}",
                str(line["best_fixed"]),
                f"{line['against_best']:.2f}",
                line["why"],
            )
    Console(width=150).print(table)


def _trained(args: argparse.Namespace) -> dict[str, Subject]:
    """The pair on each data set."""
    pair = TrainedPair.of_preset(args.preset, args.drafter)
    target = pair.load_target(getattr(torch, args.dtype), args.device)
    draft, tokenizer = pair.load_draft(target), pair.load_tokenizer()
    prompts = {x: prompt_tokens(tokenizer, x, args.prompts_dir) for x in words(args.datasets)}
    return {x: Subject(target, draft, None, prompts=prompts[x]) for x in prompts}


def _replayed(args: argparse.Namespace) -> dict[str, Subject]:
    """Random weights under each acceptance."""
    target, draft = load_subject(args.target, None, getattr(torch, args.dtype), args.device)
    alphas = map(float, args.alphas.split(","))
    return {f"α = {alpha:g}": Subject(target, draft, alpha) for alpha in alphas}

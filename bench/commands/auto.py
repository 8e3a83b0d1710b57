"""``bench auto``: automatic gamma against autoregressive decoding and every fixed gamma.

One engine, the replay drafter at each alpha with a real draft's cost. The controller takes its
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

from bench.commands.arguments import numbers
from bench.measure.record import Recorder
from bench.runs.automatic import Settings, measure_automatic
from bench.runs.decode import Subject
from bench.workloads.models import load_subject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench auto``."""
    parser.add_argument("--target", default="moe-310m", help="moe-310m, dense-310m, or a path")
    parser.add_argument("--alphas", default="0.3,0.6,0.9")
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32,64")
    parser.add_argument("--gammas", default="1,2,4,6", help="fixed gammas to compare with")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=16, help="most rounds per cell")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of rounds per cell")
    parser.add_argument("--cold", action="store_true", help="acceptance unknown in every run")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--out", help="append JSON lines to this file")


def run(args: argparse.Namespace) -> None:
    """Measure every (alpha, B), print ratios, append lines to ``--out``."""
    if args.threads:
        torch.set_num_threads(args.threads)
    recorder = Recorder(args.out, args.device)
    target, draft = load_subject(args.target, None, getattr(torch, args.dtype), args.device)
    table = Table(title=f"{args.target} {args.dtype}: automatic gamma")
    heads = ("alpha", "B", "AR / AR", "auto / AR", "best fixed", "auto / best of all", "why")
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
        for alpha in map(float, args.alphas.split(",")):
            line = measure_automatic(Subject(target, draft, alpha), batch, settings)
            recorder.write("auto", target=args.target, alpha=alpha, batch=batch, **line)
            table.add_row(
                f"{alpha:g}",
                str(batch),
                f"{line['noise']:.2f}",
                f"{line['against_ar']:.2f}",
                str(line["best_fixed"]),
                f"{line['against_best']:.2f}",
                line["why"],
            )
    Console(width=150).print(table)

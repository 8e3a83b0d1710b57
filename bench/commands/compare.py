"""``bench compare``: every prompt of a data set, autoregressive against speculative.

Counts the outputs that are the target's own, token for token, and takes the ratio of tokens per
second, prompts' cost included. With temperature the ``coupled`` verifier keeps both outputs equal.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.measure.record import Recorder
from bench.paper.dataset import Settings, measure_dataset
from bench.workloads.arguments import (
    add_dtype,
    add_machine,
    add_pair,
    at_least,
    draft_length,
    words,
)
from bench.workloads.prompts import DATA_FILES, prompt_tokens
from bench.workloads.trained import TrainedPair
from decoder.builtin import BUILTIN
from decoder.sampling import VERIFIERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench compare``."""
    add_pair(parser)
    parser.set_defaults(preset=next(iter(BUILTIN)))
    parser.add_argument("--datasets", default=",".join(DATA_FILES), help="or JSONL files")
    parser.add_argument("--limit", type=at_least(1), help="first prompts only")
    parser.add_argument("--gamma", type=draft_length, default="4", help="draft length, or auto")
    parser.add_argument("--verifier", choices=VERIFIERS, default="coupled")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch-size", type=at_least(1), default=16)
    parser.add_argument("--new-tokens", type=at_least(2), default=256)
    parser.add_argument(
        "--rounds", type=at_least(1), default=1, help="repetitions of both ways, in turn"
    )
    add_dtype(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> None:
    """Decode every data set both ways, print the counts and ratios, append lines to ``--out``."""
    recorder = Recorder(args.out, args.device)
    pair = TrainedPair.of_flags(args)
    tokenizer = pair.load_tokenizer()
    settings = Settings(
        gamma=args.gamma,
        verifier=args.verifier,
        temperature=args.temperature,
        batch=args.batch_size,
        new_tokens=args.new_tokens,
        repetitions=args.rounds,
        dtype=getattr(torch, args.dtype),
        device=args.device,
    )
    title = f"{pair.name}, {pair.drafter} drafter, γ = {args.gamma}, T = {args.temperature:g}"
    table = Table(title=f"{title}, {args.batch_size} rows, {args.new_tokens} new tokens")
    heads = ("data", "identical", "AR tokens/s", "speculative", "ratio", "α", "sigma", "eff.")
    for head in heads:
        table.add_column(head, justify="right")
    for data in words(args.datasets):
        prompts = prompt_tokens(tokenizer, data, args.prompts_dir)[: args.limit]
        fields = measure_dataset(pair, prompts, settings)
        table.add_row(*_row(recorder.write("compare", data=data, **fields)))
    Console(width=110).print(table)


def _row(line: dict[str, Any]) -> list[str]:
    rates = (line["autoregressive"]["tok_s"], line["speculative"]["tok_s"])
    shares = (line["ratio"], line["alpha"], line["sigma"], line["target_efficiency"])
    return [
        line["data"],
        f"{line['identical']}/{line['sequences']}",
        *(f"{rate:.0f}" for rate in rates),
        *("-" if share is None else f"{share:.2f}" for share in shares),
    ]

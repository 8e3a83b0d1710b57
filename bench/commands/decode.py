"""``bench decode``: T_T(B, 1), T_T(B, gamma), T_D, T_reject, sigma and speedup, in one engine.

For every batch the target decodes autoregressively, then speculatively with each gamma, round-robin
over the repetitions; the same prompts, the same kernels, the same loop. Only rounds in which every
row was live are counted, so neither admission nor a shrinking tail blurs a cell.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.gguf.contents import PLAIN, require_own_format
from bench.measure.ceilings import CeilingProbe
from bench.measure.record import Recorder
from bench.runs.decode import measure_batch
from bench.runs.decode_lines import cell_fields, describe_subject, memory_speed
from bench.runs.subject import Subject
from bench.workloads.arguments import add_dtype, add_machine, add_target_format, at_least, positives
from bench.workloads.divided import add_parallel, load_divided, rank_fields
from bench.workloads.kept import weight_format
from bench.workloads.models import DENSE, RANDOM, load_draft, load_subject
from bench.workloads.offloaded import offloaded_model
from decoder.parallel.environment import is_one_of_several
from moesd_kernels import quantize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench decode``."""
    parser.add_argument(
        "--target", default="moe-310m", help=f"{', '.join((*RANDOM, DENSE))}, or a path"
    )
    parser.add_argument("--draft", help="draft model path; default a one-layer draft, for its cost")
    parser.add_argument(
        "--alpha", type=float, default=0.947, help="acceptance of the replay drafter"
    )
    parser.add_argument("--no-replay", action="store_true", help="use the draft's own proposals")
    parser.add_argument("--batch-sizes", type=positives, default="1,2,4,8,16,24,32,48,64")
    parser.add_argument("--gammas", type=positives, default="2,4")
    parser.add_argument(
        "--num-experts-per-token", "--top-k", type=positives, help="K override, list"
    )
    parser.add_argument("--prompt-tokens", type=at_least(1), default=32)
    parser.add_argument("--new-tokens", type=at_least(2), default=32)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="repetitions of each run")
    add_dtype(parser)
    parser.add_argument(
        "--offload-budget", type=float, metavar="SHARE",
        help="leave experts in files; memory for them, as a share of the weights' bytes",
    )  # fmt: skip
    add_target_format(parser)
    add_parallel(parser)
    add_machine(parser)


def run(args: argparse.Namespace) -> None:
    """Measure every (K, B, gamma), print a table, append lines to ``--out``."""
    require_own_format(args.target, args.weight_format)
    dtype = getattr(torch, args.dtype)
    load = partial(_load, args, dtype)
    loaded = load_divided(args, dtype) if args.parallel or is_one_of_several() else load()
    if loaded is None:  # another rank, which has served the one that measures
        return
    target, draft = loaded
    stored = weight_format(target) if args.weight_format == PLAIN else args.weight_format
    recorder = Recorder(args.out, args.device)
    table = Table(title=f"{args.target} {args.dtype}, {stored} weights, alpha {args.alpha}")
    heads = ("K", "B", "gamma", "T_T(B,1) ms", "T_T(B,γ) ms", "T_D ms", "T_reject ms", "sigma")
    for head in (*heads, "efficiency", "speedup"):
        table.add_column(head, justify="right")
    probe = CeilingProbe(dtype) if torch.device(args.device).type == "cpu" else None
    # Described with the target's own K: cells carry theirs where it is overridden.
    setup = describe_subject(Subject(target, draft, alpha=None), args.device, probe)
    for top_k in args.num_experts_per_token or [None]:
        if top_k is not None:
            target, draft = load(top_k)
        subject = Subject(target, draft, None if args.no_replay else args.alpha)
        for batch in tqdm(args.batch_sizes, desc=f"K={subject.top_k}", disable=None):
            pairs = measure_batch(
                subject,
                batch,
                args.gammas,
                prompt_tokens=args.prompt_tokens,
                new_tokens=args.new_tokens,
                repetitions=args.rounds,
                read=probe.read if probe else None,
            )
            if unmeasured := set(args.gammas) - {pair.gamma for pair in pairs}:
                shown = ", ".join(map(str, sorted(unmeasured)))
                few = f"--new-tokens {args.new_tokens} are too few for a round of all rows"
                print(f"B = {batch}, gamma = {shown}: not measured, {few}", file=sys.stderr)
            for pair in pairs:
                line = recorder.write(
                    "decode",
                    **cell_fields(args.target, subject, pair, setup),
                    **memory_speed(pair, setup),
                    **rank_fields(args),
                    weight_format=stored,
                    offload_budget=args.offload_budget,
                )
                table.add_row(*_row(line))
    Console(width=120).print(table)


def _load(args: argparse.Namespace, dtype: torch.dtype, top_k: int | None = None) -> Any:
    """Target and draft."""
    if args.offload_budget is not None:
        if args.weight_format != PLAIN or args.device != "cpu":
            got = f"{args.weight_format} on {args.device}"
            raise ValueError(f"experts are left in files in plain weights, for a cpu, got {got}")
        target = offloaded_model(args.target, dtype, args.offload_budget, top_k)
        return target, load_draft(args.draft, target, dtype, args.device)
    target, draft = load_subject(args.target, args.draft, dtype, args.device, top_k)
    if args.weight_format != PLAIN:
        quantize(target, args.weight_format)
    return target, draft


def _row(line: dict[str, Any]) -> list[str]:
    milliseconds = ("ar_time", "verify_time", "draft_time", "reject_time")
    return [
        str(line["top_k"] or "-"),
        str(line["batch"]),
        str(line["gamma"]),
        *(f"{1e3 * line[name]:.2f}" for name in milliseconds),
        f"{line['sigma']:.3f}",
        f"{line['target_efficiency']:.3f}",
        f"{line['speedup']:.2f}",
    ]

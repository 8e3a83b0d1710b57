"""``bench tune``: measure tiles on this GPU and write the file the selector reads.

``bench.tuning.search`` says what is tried, and in which order.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from bench.tuning.compiling import compile_jobs
from bench.tuning.search import (
    BUDGET_S,
    CANDIDATES,
    ROUNDS,
    candidate_jobs,
    search_steps,
    tune_shape,
)
from bench.tuning.table import has_entry
from bench.workloads.arguments import at_least, dtype_name, positives
from bench.workloads.shapes import Shape, parse_shape
from moesd_kernels.experts.triton.config import model_choice
from moesd_kernels.experts.triton.device import device_of
from moesd_kernels.experts.triton.tuned import FOLDER, config_path
from moesd_kernels.experts.triton.types import H200, LayerShape

TOKENS = "1,2,4,8,16,32,64,128,256,512"
# Share of a shape's seconds that compiling may take.
COMPILING = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench tune``."""
    parser.add_argument("--shape", action="append", required=True, help="name or E,K,H,I")
    parser.add_argument("--tokens", type=positives, default=TOKENS, help="values of T to tune")
    parser.add_argument(
        "--dtype", type=dtype_name, default="bfloat16", choices=("bfloat16", "float16")
    )
    parser.add_argument(
        "--candidates", type=at_least(1), default=CANDIDATES, help="per step, the first n"
    )
    parser.add_argument("--rounds", type=at_least(1), default=ROUNDS)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for each shape")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the file is written")
    parser.add_argument("--force", action="store_true", help="tune entries the file already has")
    parser.add_argument("--dry-run", action="store_true", help="list candidates; needs no GPU")


def run(args: argparse.Namespace) -> int:
    """Tune every shape; entries are written as they are found, so a stopped run can go on."""
    tokens = args.tokens
    shapes = [parse_shape(text) for text in args.shape]
    dtype = getattr(torch, args.dtype)
    if args.dry_run:
        for shape, T in itertools.product(shapes, tokens):
            _print_candidates(LayerShape(*shape, T), dtype, args.candidates)
        return 0
    if not torch.cuda.is_available():
        raise ValueError("tune needs a CUDA device, found none; --dry-run lists the candidates")
    for shape in shapes:
        todo = [T for T in tokens if args.force or not _is_tuned(shape, T, dtype, args.folder)]
        limits = {
            "candidates": args.candidates,
            "rounds": args.rounds,
            "budget_s": args.budget,
            "folder": args.folder,
        }
        _compile(shape, todo, dtype, args)
        done = 0
        for result in tune_shape(shape, todo, dtype, **limits):
            done += 1
            times = f"{result['micros']:.1f} us, the model's {result['model_micros']:.1f} us"
            print(f"{shape} T={result['T']}: {times}, {result['config']}", flush=True)
            for dropped in result["dropped"]:
                print(f"  dropped, {dropped}")
        if done < len(todo):
            print(f"{shape}: out of time before T = {todo[done]}; run again to go on")
    return 0


def _compile(shape: Shape, todo: list[int], dtype: torch.dtype, args: argparse.Namespace) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    jobs = candidate_jobs(shape, todo, dtype, device_of(device), args.candidates)
    compile_jobs(list(jobs.values()), dtype, device, COMPILING * args.budget)


def _print_candidates(shape: LayerShape, dtype: torch.dtype, limit: int) -> None:
    chosen = model_choice(shape, dtype, H200)
    for name, step in search_steps(shape, dtype, H200, limit):
        for config in (chosen, *step(chosen)):
            print(f"{shape.layer} T={shape.T} {name} {getattr(config, name)}")


def _is_tuned(shape: Shape, T: int, dtype: torch.dtype, folder: Path) -> bool:
    path = config_path(torch.cuda.get_device_name(), folder)
    return has_entry(path, LayerShape(*shape, T), str(dtype))

"""A target divided among the processes of ``torchrun``, to be measured by rank 0."""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
import torch.distributed as dist

from bench.gguf.contents import PLAIN
from bench.workloads.models import load_draft, named_config, random_model
from decoder.cli.parallel_options import silence
from decoder.parallel.environment import world_size
from decoder.parallel.group import Ranks
from decoder.parallel.mode import Mode
from decoder.parallel.runner import lead
from decoder.parallel.worker import serve


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """``--parallel``: as of ``python -m decoder``."""
    parser.add_argument(
        "--parallel",
        choices=get_args(Mode),
        help="divide the target among the processes that torchrun has started",
    )


def load_divided(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """Target and draft on rank 0; on the others ``None``, when that one has ended.

    A random target is written to a temporary folder, which all ranks must see.

    Raises:
        ValueError: no ``--parallel``, or flags that change a target after it is loaded.
    """
    if args.parallel is None:
        raise ValueError(f"torchrun has started {world_size()} processes; expected --parallel")
    if args.num_experts_per_token or args.weight_format != PLAIN or args.offload_budget is not None:
        raise ValueError("--parallel takes a target as it is; got another K, format or a budget")
    from decoder.parallel.loading import load_part  # slow to import

    ranks = Ranks(args.device)
    if ranks.rank:
        silence()
    with TemporaryDirectory() as folder:
        config, path = named_config(args.target), args.target
        if config is not None:
            path = folder
            if ranks.rank == 0:
                random_model(config, dtype).save_pretrained(folder)
        told = [path]
        dist.broadcast_object_list(told, group=ranks.commands)
        target = load_part(told[0], args.parallel, ranks, dtype=dtype)
    if ranks.rank:
        serve(target, ranks)
        return None
    lead(target, ranks)
    return target, load_draft(args.draft, target, dtype, ranks.device)


def rank_fields(args: argparse.Namespace) -> dict[str, Any]:
    """How many processes a line was measured on, and how they divided the target."""
    return {"ranks": world_size() if args.parallel else 1, "parallel": args.parallel}

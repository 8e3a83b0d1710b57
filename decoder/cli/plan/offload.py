"""Flags of a plan for a target whose experts do not fit, and what they say."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from decoder.cli import flag_types as types
from decoder.cli.offload_options import HOST, add_budget_argument

if TYPE_CHECKING:
    from decoder.perf_model.model_spec import ModelSpec
    from decoder.perf_model.offload.reads import ExpertReads


def add_read_arguments(parser: argparse.ArgumentParser) -> None:
    """For the sub-command."""
    group = parser.add_argument_group("experts that do not fit in memory (a prediction)")
    group.add_argument(
        "--offload-experts", nargs="?", const=True, choices=(HOST,), metavar=HOST,
        help=f"of generate: read from files on a CPU (default), or, {HOST}, copied from host "
        "memory to a GPU, where nothing is brought ahead",
    )  # fmt: skip
    add_budget_argument(group)
    group.add_argument(
        "--offload-bandwidth", type=types.number(1e-3, 1e6), metavar="GB_PER_S",
        help="at which experts are brought: bytes read / seconds waited of a run without drafts",
    )  # fmt: skip


def expert_reads(args: argparse.Namespace, target: ModelSpec) -> ExpertReads | None:
    """What the flags say of the target's experts, or None without them.

    Raises:
        ValueError: a flag without the others, a target without experts, a budget in which all of
            its experts fit or not even one layer's, or vLLM's format.
    """
    budget, bandwidth = args.offload_budget, args.offload_bandwidth
    if budget is None and bandwidth is None and args.offload_experts is None:
        return None
    if budget is None or bandwidth is None:
        raise ValueError(
            "--offload-budget (GB) and --offload-bandwidth (GB/s) need each other, got "
            f"{budget} and {bandwidth}"
        )
    if args.format == "vllm":
        raise ValueError("--offload-budget is of this decoder, which --format vllm is not for")
    sparse = [layer for layer in target.layers if layer.num_experts]
    if not sparse:
        raise ValueError(f"--offload-budget needs a model with experts, got {target.name}")
    from decoder.perf_model.offload.reads import ExpertReads

    return ExpertReads(
        counts=tuple(layer.num_experts for layer in sparse),
        expert_bytes=max(layer.expert for layer in sparse) * target.expert_bytes,
        budget=budget * 1e9,
        bandwidth=bandwidth * 1e9,
        prefetches=args.offload_experts != HOST,
    )

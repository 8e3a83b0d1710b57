"""``--parallel``: its flags, what they exclude, and which processes say nothing."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import get_args

from decoder.errors import UserError
from decoder.parallel.environment import is_one_of_several, own_rank, world_size
from decoder.parallel.mode import DEFAULT_TIMEOUT, Mode

from . import flag_types as types

_FLAG = "--parallel"
_MAX_TIMEOUT = 86_400


def add_parallel_arguments(parser: argparse.ArgumentParser) -> None:
    """How a target is divided among the processes of ``torchrun``."""
    group = parser.add_argument_group("many ranks")
    group.add_argument(
        _FLAG, choices=get_args(Mode),
        help="divide the target among the processes that torchrun has started: its experts, or "
        "every matrix that transformers' plan names",
    )  # fmt: skip
    group.add_argument(
        "--parallel-timeout", type=types.number(1, _MAX_TIMEOUT), default=DEFAULT_TIMEOUT,
        metavar="SECONDS", help=f"wait for a rank in a step (default: {DEFAULT_TIMEOUT:g})",
    )  # fmt: skip


def check_parallel(args: argparse.Namespace) -> None:
    """Refuse what goes with one process only, and several processes that were told nothing.

    Raises:
        UserError: what contradicts what.
    """
    mode = getattr(args, "parallel", None)
    if mode is None:
        if is_one_of_several():
            raise UserError(
                f"torchrun has started {world_size()} processes; expected --parallel "
                f"{'|'.join(get_args(Mode))} of generate, compare, audit or demo, got none"
            )
        return
    for flag, given in (
        ("--batch-invariant", args.batch_invariant),
        ("--int8-activations", args.int8_activations),
        ("--offload-experts", args.offload_experts is not None),
    ):
        if given:
            raise UserError(f"{flag} is of one process, got --parallel {mode}")


def is_silent(arguments: Sequence[str]) -> bool:
    """Whether this process is one of several and not the one that speaks for them.

    Args:
        arguments: of the command line, not parsed yet: what is wrong with them is said once.
    """
    told = any(argument.startswith(_FLAG) for argument in arguments)
    return own_rank() > 0 and world_size() > 1 and (told or is_one_of_several())


def silence() -> int:
    """Have nothing of this process reach the user; a descriptor of what was standard error."""
    spoken = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    return spoken

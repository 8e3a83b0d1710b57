"""Flags for experts that do not fit in memory."""

from __future__ import annotations

import argparse
from pathlib import Path

from decoder.errors import UserError
from decoder.offload import Offload

from . import flag_types as types

_OWN = True  # no folder is named: the target's own files
HOST = "cpu"
_MOST = 10**6  # GB


def add_offload_arguments(group: argparse._ArgumentGroup) -> None:
    """For commands that load a target."""
    group.add_argument(
        "--offload-experts", nargs="?", const=_OWN, type=types.path, metavar=f"DIR|{HOST}",
        help="on a CPU: read experts from the target's safetensors files as steps need them, or "
        f"from a copy of these in DIR; on a GPU, {HOST}: copy them from host memory",
    )  # fmt: skip
    add_budget_argument(group)


def add_budget_argument(group: argparse._ArgumentGroup) -> None:
    """How much memory experts may take."""
    group.add_argument(
        "--offload-budget", type=types.number(0, _MOST), metavar="GB",
        help="memory for experts with --offload-experts, of the device",
    )  # fmt: skip


def offload_of(args: argparse.Namespace) -> Offload | None:
    """What the flags say.

    Raises:
        UserError: one of them without the other.
    """
    folder, budget = args.offload_experts, args.offload_budget
    if folder is None and budget is None:
        return None
    if folder is None:
        raise UserError("--offload-budget is read with --offload-experts only")
    if budget is None:
        raise UserError("--offload-experts needs --offload-budget: memory for experts, in GB")
    if folder == HOST:
        return Offload(int(budget * 1e9), host=True)
    copies = None if folder is _OWN else Path(folder)
    if copies is not None and not copies.is_dir():
        raise UserError(f"--offload-experts must name a folder, got {folder!r}")
    return Offload(int(budget * 1e9), copies)

"""Flags and spellings that several sub-commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from decoder.builtin import BUILTIN
from decoder.cli import flag_types as flag
from decoder.drafters.table import AUTO, drafter_names
from decoder.model.loading import DTYPES


def at_least(least: int) -> Callable[[str], int]:
    """The ``type`` of a flag that takes one number."""
    return flag.whole(least, flag.MAX_COUNT)


def positives(text: str) -> list[int]:
    """The ``type`` of a flag that takes batch sizes, draft lengths or the like."""
    return [at_least(1)(part) for part in text.split(",")]


def naturals(text: str) -> list[int]:
    """The same, with 0."""
    return [at_least(0)(part) for part in text.split(",")]


def draft_length(text: str) -> str:
    """The ``type`` of a flag that takes a draft length, 0 for none, or ``auto``."""
    return text if text == AUTO else str(at_least(0)(text))


def draft_lengths(text: str) -> list[str]:
    """The same of several."""
    return [draft_length(part) for part in text.split(",")]


def dtype_name(text: str) -> str:
    """The ``type`` of ``--dtype``: PyTorch's name of any spelling that ``decoder`` knows."""
    known = {name: dtype for name, dtype in DTYPES.items() if name != AUTO}
    if text not in known:
        names = ", ".join(known)
        raise argparse.ArgumentTypeError(f"expected one of {names}, got {text!r}")
    return str(known[text]).removeprefix("torch.")


def words(text: str) -> list[str]:
    """``"a,b"`` -> ``["a", "b"]``."""
    return text.split(",")


def add_pair(parser: argparse.ArgumentParser) -> None:
    """``--preset``: a trained pair by its name, and ``add_drafting`` for it."""
    parser.add_argument(
        "--preset", choices=BUILTIN, help="a trained pair, on its data sets' prompts"
    )
    add_drafting(parser)


def add_drafting(parser: argparse.ArgumentParser) -> None:
    """What drafts for a trained pair, and where the prompts lie."""
    parser.add_argument(
        "--drafter",
        choices=drafter_names(),
        default=AUTO,
        help="who drafts for a trained pair (default: its draft model)",
    )
    parser.add_argument(
        "--prompts-dir",
        type=Path,
        default=Path(),
        help="folder of HumanEval.jsonl.gz and mt_bench.jsonl (default: this one)",
    )


def refuse_ignored(args: argparse.Namespace, subject: str, *flags: str) -> None:
    """Refuse what would change nothing: a line would be taken for a run with it.

    Args:
        subject: what ignores the flags, which have no default but a drafter's.

    Raises:
        ValueError: one of them is given.
    """
    value = lambda flag: getattr(args, flag.replace("-", "_"))
    given = [f"--{flag} {value(flag)}" for flag in flags if value(flag) not in (None, AUTO)]
    if given:
        raise ValueError(f"{subject} takes no {', no '.join(flags)}, got {' '.join(given)}")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """In what numbers models run, bf16 by default."""
    parser.add_argument("--dtype", type=dtype_name, default="bfloat16")


def add_target_format(parser: argparse.ArgumentParser) -> None:
    """In what format the target's weights are stored before it is measured."""
    parser.add_argument(
        "--weight-format",
        default="plain",
        choices=("plain", "int8", "int4"),
        help="of the target, which is quantised here; a GGUF file has its own",
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Where to measure, with how many threads, and where the lines go."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=flag.device, default=here, help="default: cuda when there is one"
    )
    parser.add_argument("--threads", type=flag.threads, help="torch.set_num_threads")
    parser.add_argument("--out", help="append JSON lines to this file")

"""Checkpoints, and what stages hand on, that an interruption leaves whole."""

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(state: Any, path: Path) -> None:
    """Write what ``load_checkpoint`` reads; the one before stays until it is there."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def load_checkpoint(path: Path) -> Any:
    """What ``save_checkpoint`` wrote, in host memory, whichever device it was written from.

    Raises:
        SystemExit: there is none, and says so.
    """
    if not path.exists():
        raise SystemExit(f"{path} is not there: an earlier stage of training makes it")
    return torch.load(path, weights_only=True, map_location="cpu")


def cut_half_line(path: Path) -> None:
    """Cut off what an interruption has left half written: the next line would go on in it."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

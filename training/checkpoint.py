"""Checkpoints, and what stages hand on, that an interruption leaves whole."""

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(state: Any, path: Path) -> None:
    """Write what ``torch.load`` reads with ``weights_only``; the one before stays until it is."""
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def end_with_a_whole_line(path: Path) -> None:
    """Cut off what an interruption has left half written: the next line would go on in it."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

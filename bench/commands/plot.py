"""``bench plot``: pictures from JSON lines; each picture names the kind of line it needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.measure.record import read_lines

Lines = list[dict[str, Any]]


def pictures() -> dict[str, tuple[str, Callable[[Lines, Path], list[Path]]]]:
    """Picture name -> (kind of line, function that draws it and returns the files)."""
    from bench.pictures import decode, kernels

    return {
        "layer-time": ("kernel", kernels.draw_layer_time),
        "layer-efficiency": ("kernel", kernels.draw_efficiency_map),
        "speedup": ("decode", decode.draw_speedup),
        "target-efficiency": ("decode", decode.draw_target_efficiency),
        "predicted": ("decode", decode.draw_predicted),
        "activation": ("decode", decode.draw_activation),
        "map": ("decode", decode.draw_map),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench plot``."""
    parser.add_argument("lines", nargs="+", type=Path, help="JSONL files or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")


def run(args: argparse.Namespace) -> None:
    """Draw every picture that the lines allow."""
    for path in draw_all(args.lines, args.out):
        print(path)


def draw_all(sources: list[Path], out: Path) -> list[Path]:
    """Draw every picture for which ``sources`` hold lines.

    Raises:
        ValueError: no line of any known kind.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    for kind, draw in pictures().values():
        lines = list(read_lines(sources, kind))
        if lines:
            drawn += draw(lines, out)
    if not drawn:
        kinds = sorted({kind for kind, _ in pictures().values()})
        raise ValueError(f"no lines of kind {', '.join(kinds)} in {', '.join(map(str, sources))}")
    return drawn

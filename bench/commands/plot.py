"""``bench plot``: pictures from JSON lines."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.pictures.gallery import draw_all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench plot``."""
    parser.add_argument("lines", nargs="+", type=Path, help="JSONL files or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")


def run(args: argparse.Namespace) -> None:
    """Draw every picture that the lines allow."""
    for path in draw_all(args.lines, args.out):
        print(path)

"""``bench report``: one self-contained HTML page for a folder of results."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.page.build import render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench report``."""
    parser.add_argument("folder", type=Path, help="folder with JSONL files")
    parser.add_argument("--out", type=Path, help="default: report.html in the folder")


def run(args: argparse.Namespace) -> None:
    """Write the page and print its path."""
    out = args.out or args.folder / "report.html"
    out.write_text(render(args.folder))
    print(out)

"""``bench report``: one self-contained HTML page for a folder of results."""

from __future__ import annotations

import argparse
import base64
import html
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.measure.record import read_lines
from bench.pictures.gallery import draw_all

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; } img { max-width: 100%; }
td, th { border: 1px solid #ccc; padding: 2px 8px; text-align: right; } code { font-size: 12px; }
"""
# Columns shown per kind of line; anything else stays in the JSON lines.
COLUMNS = {
    "kernel": ("shape", "routing", "B", "gamma", "T", "distinct", "gb_per_s", "of_roof", "ratio"),
    "generate": ("target", "B", "variant", "gamma", "times_faster_than", "identical_to_ours"),
    "decode": ("target", "top_k", "batch", "gamma", "sigma", "target_efficiency", "speedup"),
    "paper": (
        *("preset", "label", "data", "temperature", "gamma", "sigma", "paper_sigma"),
        *("speedup", "paper_speedup", "predicted_speedup"),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``bench report``."""
    parser.add_argument("folder", type=Path, help="folder with JSONL files")
    parser.add_argument("--out", type=Path, help="default: report.html in the folder")


def run(args: argparse.Namespace) -> None:
    """Write the page and print its path."""
    out = args.out or args.folder / "report.html"
    out.write_text(render(args.folder))
    print(out)


def render(folder: Path) -> str:
    """The page: environments, pictures drawn now from the lines, one table per kind of line."""
    lines = list(read_lines([folder]))
    if not lines:
        raise ValueError(f"no JSON lines below {folder}")
    with tempfile.TemporaryDirectory() as scratch:
        pictures = draw_all([folder], Path(scratch))
        images = "".join(map(_image, pictures))
    tables = "".join(_table(kind, lines) for kind in COLUMNS)
    commands = sorted({line["env"]["command"] for line in lines if "env" in line})
    devices = sorted({line["env"]["device"] for line in lines if "env" in line})
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(folder.name)}</title>"
        f"<style>{STYLE}</style><h1>Measurements: {html.escape(folder.name)}</h1>"
        f"<p>{html.escape('; '.join(devices))}</p>"
        f"<h2>Pictures</h2>{images}{tables}<h2>Commands</h2>"
        + "".join(f"<p><code>{html.escape(command)}</code></p>" for command in commands)
    )


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{path.stem}" src="data:image/png;base64,{data}"></p>'


def _table(kind: str, lines: Iterable[dict[str, Any]]) -> str:
    rows = [line for line in lines if line.get("kind") == kind]
    if not rows:
        return ""
    cells = lambda values, tag: "".join(f"<{tag}>{html.escape(v)}</{tag}>" for v in values)
    body = "".join(
        f"<tr>{cells([_text(row.get(column)) for column in COLUMNS[kind]], 'td')}</tr>"
        for row in rows
    )
    return f"<h2>{kind}</h2><table><tr>{cells(COLUMNS[kind], 'th')}</tr>{body}</table>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return "" if value is None else str(value)

"""What all pictures share: a backend without a display, one look, one way to save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Lines = list[dict[str, Any]]


def axes(title: str, xlabel: str, ylabel: str, *, log_x: bool = False) -> tuple[Any, Any]:
    """One figure with one pair of labelled, gridded axes."""
    figure, ax = plt.subplots(figsize=(7, 4.5))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=9)
    if log_x:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.3, which="both")
    return figure, ax


def heat_map(ax: Any, grid: list[list[float]], xs: list[int], ys: list[int], **limits: Any) -> Any:
    """A labelled map of ``grid[y][x]``; NaN cells stay empty."""
    image = ax.imshow(grid, origin="lower", aspect="auto", **limits)
    ax.set_xticks(range(len(xs)), xs)
    ax.set_yticks(range(len(ys)), ys)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w")
    return image


def save(figure: Any, out: Path, name: str) -> Path:
    """Write ``out/name.png`` and close the figure."""
    path = out / f"{name.replace(',', '_').replace(' ', '-').replace('/', '_')}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path

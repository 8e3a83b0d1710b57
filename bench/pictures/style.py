"""What all pictures share: a backend without a display, one look, one way to save.

Drawn as PNG they have a white ground and stand alone. Inside ``with inline_svg():`` they are SVG
without a ground, and what is black becomes ``currentColor``: an HTML page that holds them decides,
so that one picture serves a light and a dark page.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

Lines = list[dict[str, Any]]

INCHES = (4.7, 3.3)
# Of middling lightness: legible on white and on black.
COLORS = ("#2f7fd6", "#e0702a", "#2e9e5b", "#c0489a", "#8a6fd1", "#a98600", "#14a0a8", "#d1495b")
LOOK: dict[Any, Any] = {
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.figsize": INCHES,
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.markersize": 3.5,
    "savefig.dpi": 160,
    "savefig.format": "png",
}
plt.rcParams.update(LOOK)

# A black that nothing else has, found again in the file.
INK = "#010203"
SVG: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.format": "svg",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def inline_svg() -> Iterator[None]:
    """Pictures drawn inside are SVG whose ink is the surrounding text's colour."""
    with matplotlib.rc_context(SVG):
        yield


def ink() -> str:
    """The colour of text and of lines that belong to no series."""
    return plt.rcParams["text.color"]


def of_device(words: str, line: dict[str, Any]) -> str:
    """A title that names the processor of a line."""
    return f"{words} · {line['env']['device']}"


def of_acceptance(line: dict[str, Any]) -> str:
    """What decided acceptance in a line: the alpha imposed, or the text of a data set."""
    return line["data"] if line["alpha"] is None else f"α = {line['alpha']:g}"


def axes(title: str, xlabel: str, ylabel: str, *, log_x: bool = False) -> tuple[Any, Any]:
    """One figure with one pair of labelled, gridded axes."""
    figure, ax = plt.subplots()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, loc="left")
    if log_x:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(alpha=0.25, which="major")
    return figure, ax


def legend(ax: Any, title: str | None = None) -> None:
    """Labels below the axes, where they cover no data, in as many columns as they leave room."""
    labels = ax.get_legend_handles_labels()[1]
    if not labels:
        return
    width = 0.55 + 0.075 * max(map(len, labels))  # inches of a column
    columns = max(1, min(len(labels), int(INCHES[0] / width)))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, title=title)


def log_y(ax: Any) -> None:
    """A logarithmic vertical axis whose numbers are plain."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def heat_map(ax: Any, grid: list[list[float]], xs: list[int], ys: list[int], **limits: Any) -> Any:
    """A labelled map of ``grid[y][x]``; NaN cells stay empty."""
    image = ax.imshow(grid, origin="lower", aspect="auto", **limits)
    ax.set_xticks(range(len(xs)), xs)
    ax.set_yticks(range(len(ys)), ys)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                bright = image.norm(value) > 0.6
                color = "black" if bright else "white"
                label = f"{value:.2f}" if len(xs) <= 8 else f"{value:.1f}"
                ax.text(x, y, label, ha="center", va="center", fontsize=8, color=color)
    return image


def save(figure: Any, out: Path, name: str) -> Path:
    """Write ``out/name`` in the format of the moment and close the figure."""
    suffix = plt.rcParams["savefig.format"]
    path = out / f"{name.replace(',', '_').replace(' ', '-').replace('/', '_')}.{suffix}"
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    if suffix == "svg":
        path.write_text(path.read_text().replace(INK, "currentColor"))
    return path

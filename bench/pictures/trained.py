"""Pictures of a trained pair with its own draft: speedups, and the two things they are made of."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from bench.paper.beside import Row, rows_of, runs_of
from bench.pictures.style import INCHES, Lines, ink, of_device, save

WORDS = {"humaneval": "HumanEval", "mt_bench": "MT-bench"}
GAMMA_COLORS = {gamma: f"C{index}" for index, gamma in enumerate((2, 3, 4, 1, 5, 6, 7, 8))}


def draw_speedups(lines: Lines, out: Path) -> list[Path]:
    """Speedup over B of every draft length, a panel per data set and temperature.

    Dashed: predicted at the measured sigma, nothing fitted. Dotted: the paper's best of that panel.
    """
    drawn = []
    for run, cells in runs_of(lines).items():
        texts = _by_text(cells)
        datasets = sorted({data for data, _ in texts})
        temperatures = sorted({temperature for _, temperature in texts})
        rows, columns = len(temperatures), len(datasets)
        figure, panels = plt.subplots(
            rows, columns, sharex=True, sharey=True, squeeze=False, layout="constrained",
            figsize=(INCHES[0] * max(columns, 1.4), 0.85 * INCHES[1] * rows + 0.5),
        )  # fmt: skip
        for (data, temperature), found in texts.items():
            ax = panels[temperatures.index(temperature)][datasets.index(data)]
            _over_batch(ax, f"{WORDS[data]}, T = {temperature:g}")
            _curves(ax, found, "speedup", "predicted_speedup")
            ax.axhline(1.0, color=ink(), lw=0.8)
            best = max((row.paper_speedup or 0.0 for row in rows_of(found)), default=0.0)
            if best:
                ax.axhline(best, color=ink(), lw=0.8, ls=":", label="paper's best")
        for ax in panels[:, 0]:
            ax.set_ylabel("speculative / autoregressive")
        _name(figure, panels.flat, f"{run.pair}, {run.drafter} drafter", found[0])
        drawn.append(save(figure, out, f"speedup-{run.pair}-{run.drafter}-trained"))
    return drawn


def draw_acceptance(lines: Lines, out: Path) -> list[Path]:
    """Sigma over the draft length beside the paper's (hollow), and target efficiency over B."""
    drawn = []
    for run, cells in runs_of(lines).items():
        figure, (left, right) = plt.subplots(
            1, 2, layout="constrained", figsize=(2 * INCHES[0], 1.25 * INCHES[1])
        )
        _draw_sigma(left, rows_of(cells))
        _over_batch(right, "verification: T(B, 1) / T(B, γ + 1)")
        _curves(right, cells, "target_efficiency", "predicted_target_efficiency")
        right.set(ylabel="target efficiency", ylim=(0.0, None))
        for ax in (left, right):
            ax.legend(fontsize=8, loc="lower left")
        figure.suptitle(of_device(f"{run.pair}, {run.drafter} drafter", cells[0]), fontsize=10)
        drawn.append(save(figure, out, f"acceptance-{run.pair}-{run.drafter}-trained"))
    return drawn


def _draw_sigma(ax: Any, rows: list[Row]) -> None:
    curves: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        curves[row.data, row.temperature].append(row)
    for index, ((data, temperature), found) in enumerate(curves.items()):
        color, gammas = f"C{index}", [row.gamma for row in found]
        label = f"{WORDS[data]}, T = {temperature:g}"
        ax.plot(gammas, [row.sigma for row in found], "o-", color=color, label=label)
        papers = [(row.gamma, row.paper_sigma) for row in found if row.paper_sigma]
        if papers:
            ax.plot(*zip(*papers, strict=True), "o", color=color, mfc="none", ms=6)
    ax.plot([], [], "o", color=ink(), mfc="none", ms=6, label="the paper's")
    ax.set(xlabel="draft length γ", ylabel="σ", ylim=(0.0, 1.0))
    ax.set_xticks(sorted({row.gamma for row in rows}))
    ax.set_title("acceptance: tokens emitted of those possible", loc="left")
    ax.grid(alpha=0.25)


def _by_text(cells: Lines) -> dict[tuple[str, int], Lines]:
    texts: dict[tuple[str, int], Lines] = defaultdict(list)
    for line in cells:
        texts[line["data"], line["temperature"]].append(line)
    return texts


def _curves(ax: Any, cells: Lines, measured: str, predicted: str) -> None:
    """A curve per draft length over B, and its prediction; medians where texts share a batch."""
    for gamma in sorted({line["gamma"] for line in cells}):
        points: dict[int, Lines] = defaultdict(list)
        for line in cells:
            if line["gamma"] == gamma:
                points[line["batch"]].append(line)
        batches = sorted(points)
        column = lambda name, p=points, b=batches: [
            statistics.median(x[name] for x in p[n]) for n in b
        ]
        color = GAMMA_COLORS.get(gamma)
        ax.plot(batches, column(measured), "o-", color=color, label=f"γ = {gamma}")
        ax.plot(batches, column(predicted), "--", color=color, lw=1)
    ax.plot([], [], "--", color=ink(), lw=1, label="predicted")


def _over_batch(ax: Any, title: str) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("batch B")
    ax.set_title(title, loc="left")
    ax.grid(alpha=0.25)


def _name(figure: Any, panels: Any, title: str, line: dict[str, Any]) -> None:
    """A title, and one legend of what the panels have in common."""
    figure.suptitle(of_device(title, line), fontsize=11)
    named: dict[str, Any] = {}
    for ax in panels:
        handles, labels = ax.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
        ax.label_outer()
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named))

"""Pictures of decode cells: the inverted U, target efficiency, the models' predictions, N(t)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench.pictures.formats import PLAIN, stored_as
from bench.pictures.style import Lines, axes, heat_map, ink, legend, of_device, save
from bench.runs.cells import Cells, apart, group_cells, setup_of
from bench.runs.fitting import fit_cells
from decoder.perf_model.forward_fit import fit_forward
from decoder.perf_model.observations import Observation, paper_order, spread_indices
from decoder.perf_model.theory import active_experts

FITTED_POINTS = 21


def _curves(cells: Cells) -> Iterator[tuple[tuple[int | None, int], list[Observation]]]:
    """((K, gamma), cells over B) of one target."""
    curves: dict[tuple[int | None, int], list[Observation]] = defaultdict(list)
    for o in sorted(cells.observations, key=lambda o: o.batch):
        curves[o.top_k, o.gamma].append(o)
    yield from curves.items()


def draw_speedup(lines: Lines, out: Path) -> list[Path]:
    """Speedup over B for every K and gamma; dashed, the fit on 21 cells where there are enough."""
    drawn = []
    for name, cells in _named(lines):
        predict = _fitted(cells)
        for gamma in sorted({o.gamma for o in cells.observations}):
            title = of_device(f"{name}, γ = {gamma}", cells.lines[0])
            figure, ax = axes(title, "batch B", "speculative / autoregressive", log_x=True)
            for (top_k, g), curve in _curves(cells):
                if g != gamma:
                    continue
                batches = [o.batch for o in curve]
                label = f"K = {top_k}" if top_k else "dense"
                (line,) = ax.plot(batches, [o.speedup for o in curve], "o-", label=label)
                if predict:
                    predicted = [predict(o) for o in curve]
                    ax.plot(batches, predicted, "--", color=line.get_color(), lw=1)
            ax.axhline(1.0, color=ink(), lw=0.8)
            legend(ax, "dashed: fitted model" if predict else None)
            drawn.append(save(figure, out, f"speedup-{name}-gamma{gamma}"))
    return drawn


def draw_target_efficiency(lines: Lines, out: Path) -> list[Path]:
    """Target efficiency and speedup over B, every target (MoE and dense) in one picture each."""
    groups = _named(lines)
    gamma = max(line["gamma"] for line in lines)
    drawn = []
    for key, label in (("target_efficiency", "T_T(B,1) / T_T(B,γ)"), ("speedup", "speedup")):
        figure, ax = axes(of_device(f"γ = {gamma}", lines[0]), "batch B", label, log_x=True)
        for of, cells in groups:
            rows = sorted((x for x in cells.lines if x["gamma"] == gamma), key=_order)
            for top_k in dict.fromkeys(x["top_k"] for x in rows):
                curve = [x for x in rows if x["top_k"] == top_k]
                name = of + (f" K={top_k}" if top_k else "")
                ax.plot([x["batch"] for x in curve], [x[key] for x in curve], "o-", label=name)
        legend(ax)
        drawn.append(save(figure, out, f"{key.replace('_', '-')}-moe-and-dense"))
    return drawn


def draw_predicted(lines: Lines, out: Path) -> list[Path]:
    """Predicted against measured speedup on held-out cells, with a 5 % and a 12 % band."""
    drawn = []
    for name, cells in _named(lines):
        if len(cells.observations) < 2 * FITTED_POINTS or apart(cells.lines[0]):
            continue
        fits = fit_cells(cells, FITTED_POINTS, "spread")
        measured = np.array([o.speedup for o in fits.held_out])
        figure, ax = axes(f"{name}: held-out cells", "measured speedup", "predicted")
        edge = np.array([0.9 * measured.min(), 1.1 * measured.max()])
        for share in (0.12, 0.05):
            ax.fill_between(edge, edge * (1 - share), edge * (1 + share), color=ink(), alpha=0.08)
        for fit, predict in fits.predictors().items():
            error = fits.errors()[fit]
            label = f"{fit}: median {error.median:.1%}, p90 {error.p90:.1%}"
            ax.plot(measured, [predict(o) for o in fits.held_out], "o", label=label)
        ax.plot(edge, edge, "-", color=ink(), lw=0.8)
        legend(ax)
        drawn.append(save(figure, out, f"predicted-{name}"))
    return drawn


def draw_activation(lines: Lines, out: Path) -> list[Path]:
    """Distinct experts measured per layer and step, against N(t) of Eq. 8."""
    drawn = []
    for name, cells in _named(lines):
        moe = cells.model.target.moe
        if moe is None or not any(x["experts_ar"] for x in cells.lines):
            continue
        figure, ax = axes(f"{name}: expert activation", "tokens t", "experts", log_x=True)
        for top_k in sorted({x["top_k"] for x in cells.lines}):
            seen = {}
            for x in cells.lines:
                if x["top_k"] == top_k and x["experts_ar"]:
                    seen[x["batch"]] = x["experts_ar"]
                    seen[x["batch"] * (x["gamma"] + 1)] = x["experts_verify"]
            tokens = np.array(sorted(t for t, n in seen.items() if n))
            theory = active_experts(tokens, moe.num_experts, top_k)
            (line,) = ax.plot(tokens, [seen[t] for t in tokens], "o", label=f"K = {top_k}")
            ax.plot(tokens, theory, "--", lw=1, color=line.get_color())
        legend(ax, "dashed: N(t), i.i.d.")
        drawn.append(save(figure, out, f"activation-{name}"))
    return drawn


def draw_map(lines: Lines, out: Path) -> list[Path]:
    """Speedup over B and gamma for each K measured at two or more gammas."""
    drawn = []
    for name, cells in _named(lines):
        speedups = {(o.top_k, o.gamma, o.batch): o.speedup or 0.0 for o in cells.observations}
        batches = sorted({o.batch for o in cells.observations})
        gammas = sorted({o.gamma for o in cells.observations})
        for top_k in sorted({o.top_k for o in cells.observations}, key=lambda k: k or 0):
            if len(gammas) < 2:
                continue
            title = name + (f", K = {top_k}" if top_k else "")
            title = of_device(title, cells.lines[0])
            figure, ax = axes(title, "batch B", "draft length γ")
            cell = lambda b, g, k=top_k, s=speedups: s.get((k, g, b), float("nan"))
            grid = [[cell(b, g) for b in batches] for g in gammas]
            ax.grid(False)
            figure.colorbar(heat_map(ax, grid, batches, gammas), ax=ax, label="speedup")
            drawn.append(save(figure, out, f"map-{name}" + (f"-K{top_k}" if top_k else "")))
    return drawn


def _fitted(cells: Cells) -> Callable[[Observation], float] | None:
    """The improved model fitted on ``FITTED_POINTS`` cells, where there are twice as many."""
    if len(cells.observations) < 2 * FITTED_POINTS or apart(cells.lines[0]):
        return None
    ordered = paper_order(cells.observations)
    chosen = [ordered[i] for i in spread_indices(ordered, FITTED_POINTS)]
    return fit_forward(cells.model, chosen).predict


def _named(lines: Lines) -> list[tuple[str, Cells]]:
    """Groups by names of their own, as each is a picture: told apart where one target is in two."""
    groups = group_cells(lines)
    counts = Counter(map(_name, groups))
    return [
        (_name(cells) if counts[_name(cells)] == 1 else f"{_name(cells)} {_ran(cells)}", cells)
        for cells in groups
    ]


def _name(cells: Cells) -> str:
    line = cells.lines[0]
    words = [line["target"].rstrip("/").rsplit("/", 1)[-1]]
    words += [] if stored_as(line) == PLAIN else [line["weight_format"]]
    return " ".join(filter(None, (*words, line.get("drafter"), apart(line))))


def _ran(cells: Cells) -> str:
    """What else a group may differ in."""
    setup = setup_of(cells.lines[0])
    words = f"{setup.dtype}, {setup.device}, {setup.threads} threads, draft {setup.draft_format}"
    return ", ".join(filter(None, (words, setup.target_files, setup.draft_files)))


def _order(line: dict) -> tuple[int, int]:
    return (line["top_k"] or 0, line["batch"])

"""Pictures of the layer microbenchmark: time over T against the roofline, and the B x gamma map."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Lines = list[dict[str, Any]]
LABELS = {"moesd": "moesd", "grouped_mm": "transformers grouped_mm", "vllm": "vLLM cpu_fused_moe"}


def _by_layer(lines: Lines) -> dict[str, Lines]:
    layers: dict[str, Lines] = defaultdict(list)
    for line in lines:
        layers[f"{','.join(map(str, line['shape']))} {line['dtype']} {line['routing']}"].append(
            line
        )
    return layers


def _file(out: Path, picture: str, layer: str) -> Path:
    return out / f"{picture}-{layer.replace(',', '_').replace(' ', '-')}.png"


def draw_layer_time(lines: Lines, out: Path) -> list[Path]:
    """Milliseconds over T for every variant, with the roofline below and the p20-p80 band."""
    drawn = []
    for layer, points in _by_layer(lines).items():
        points = sorted(points, key=lambda p: p["T"])
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for name in dict.fromkeys(n for p in points for n in p["seconds"]):
            here = [p for p in points if name in p["seconds"]]
            tokens = [p["T"] for p in here]
            axes.plot(
                tokens,
                [1e3 * p["seconds"][name]["median"] for p in here],
                marker="o",
                ms=3,
                label=LABELS.get(name, name),
            )
            axes.fill_between(
                tokens,
                [1e3 * p["seconds"][name]["p20"] for p in here],
                [1e3 * p["seconds"][name]["p80"] for p in here],
                alpha=0.2,
            )
        axes.plot(
            [p["T"] for p in points],
            [1e3 * p["floor_s"] for p in points],
            "k--",
            label="roofline",
        )
        axes.set(xscale="log", yscale="log", xlabel="tokens T entering the layer", ylabel="ms")
        axes.set_title(f"MoE layer E,K,H,I = {layer}\n{points[0]['env']['device']}", fontsize=9)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
        drawn.append(_save(figure, _file(out, "layer-time", layer)))
    return drawn


def draw_efficiency_map(lines: Lines, out: Path) -> list[Path]:
    """Target efficiency T(B)/T(B(gamma+1)) of the layer over B and gamma, beside the roofline's."""
    drawn = []
    for layer, points in _by_layer(lines).items():
        seconds = {(p["B"], p["gamma"]): p["seconds"]["moesd"]["median"] for p in points}
        floors = {(p["B"], p["gamma"]): p["floor_s"] for p in points}
        batches = sorted({b for b, g in seconds if g == 0})
        gammas = sorted({g for _, g in seconds if g > 0})
        if not batches or not gammas:
            continue
        figure, both = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
        for axes, times, title in ((both[0], seconds, "measured"), (both[1], floors, "roofline")):
            grid = [
                [times[b, 0] / times[b, g] if (b, g) in times else float("nan") for b in batches]
                for g in gammas
            ]
            image = axes.imshow(grid, origin="lower", aspect="auto", vmin=0, vmax=1)
            axes.set_xticks(range(len(batches)), batches)
            axes.set_yticks(range(len(gammas)), gammas)
            axes.set(xlabel="batch B", title=title)
            for y, row in enumerate(grid):
                for x, value in enumerate(row):
                    if value == value:
                        axes.text(
                            x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w"
                        )
        both[0].set_ylabel("draft length gamma")
        figure.colorbar(image, ax=both, label="target efficiency")
        figure.suptitle(f"E,K,H,I = {layer}", fontsize=10)
        drawn.append(_save(figure, _file(out, "layer-efficiency", layer)))
    return drawn


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path

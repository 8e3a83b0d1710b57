"""Pictures of the layer microbenchmark: time over T against the roofline, and the B x gamma map."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

from bench.pictures.style import Lines, axes, heat_map, save

LABELS = {
    "grouped_mm": "transformers grouped_mm",
    "batched_mm": "transformers batched_mm",
    "vllm": "vLLM cpu_fused_moe",
    "vllm_triton": "vLLM fused_moe (Triton)",
    "vllm_triton_h200": "vLLM fused_moe, tiles of an H200",
    "batch_invariant": "moesd, batch_invariant",
}


def _by_layer(lines: Lines) -> dict[str, Lines]:
    layers: dict[str, Lines] = defaultdict(list)
    for line in sorted(lines, key=lambda line: line["T"]):
        words = [",".join(map(str, line["shape"])), line["dtype"], line["routing"]]
        # A back-end asked for by name and tiles found by tuning are pictures of their own.
        words += [line["backend"]] if line["backend"] != "auto" else []
        words += ["tuned"] if line.get("tuned") else []
        layers[" ".join(words)].append(line)
    return layers


def draw_layer_time(lines: Lines, out: Path) -> list[Path]:
    """Milliseconds over T for every variant with its p20-p80 band, and the roofline below."""
    drawn = []
    for layer, measured in _by_layer(lines).items():
        # One line per T, that with most peers: a sweep and a comparison may share a shape.
        by_tokens = {p["T"]: p for p in sorted(measured, key=lambda p: len(p["seconds"]))}
        points = [by_tokens[tokens] for tokens in sorted(by_tokens)]
        title = f"MoE layer E,K,H,I = {layer}\n{points[0]['env']['device']}"
        figure, ax = axes(title, "tokens T entering the layer", "ms", log_x=True)
        ax.set_yscale("log")
        for name in dict.fromkeys(name for p in points for name in p["seconds"]):
            timed = [p for p in points if name in p["seconds"]]
            tokens = [p["T"] for p in timed]
            column = lambda key, n=name, h=timed: [1e3 * p["seconds"][n][key] for p in h]
            ax.plot(tokens, column("median"), marker="o", ms=3, label=LABELS.get(name, name))
            ax.fill_between(tokens, column("p20"), column("p80"), alpha=0.2)
        floor = [1e3 * p["floor_s"] for p in points]
        ax.plot([p["T"] for p in points], floor, "k--", label="roofline")
        ax.legend(fontsize=8)
        drawn.append(save(figure, out, f"layer-time-{layer}"))
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
        figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
        for ax, times, title in ((panels[0], seconds, "measured"), (panels[1], floors, "roofline")):
            value = lambda b, g, t=times: t[b, 0] / t[b, g] if (b, g) in t else float("nan")
            grid = [[value(b, g) for b in batches] for g in gammas]
            image = heat_map(ax, grid, batches, gammas, vmin=0, vmax=1)
            ax.set(xlabel="batch B", title=title)
        panels[0].set_ylabel("draft length gamma")
        figure.colorbar(image, ax=panels, label="target efficiency")
        figure.suptitle(f"E,K,H,I = {layer}", fontsize=10)
        drawn.append(save(figure, out, f"layer-efficiency-{layer}"))
    return drawn

"""Pictures of the MoE layer: over T against roofline and peers, and the B x gamma map."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

from bench.pictures.formats import PLAIN, stored_as, stored_words
from bench.pictures.style import Lines, axes, heat_map, ink, legend, log_y, of_device, save

LABELS = {
    "grouped_mm": "transformers grouped_mm",
    "batched_mm": "transformers batched_mm",
    "vllm": "vLLM cpu_fused_moe",
    "vllm_triton": "vLLM fused_moe (Triton)",
    "vllm_triton_h200": "vLLM fused_moe, tiles of an H200",
    "batch_invariant": "moesd, batch_invariant",
    "plain": "moesd, plain weights",
}


def _by_layer(lines: Lines) -> dict[str, Lines]:
    layers: dict[str, Lines] = defaultdict(list)
    for line in sorted(lines, key=lambda line: line["T"]):
        words = [",".join(map(str, line["shape"])), line["dtype"], line["routing"]]
        words += [stored_words(line)] if stored_as(line) != PLAIN else []
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
        title = of_device(layer, points[0])
        figure, ax = axes(title, "tokens T entering the layer", "ms", log_x=True)
        log_y(ax)
        for name in dict.fromkeys(name for p in points for name in p["seconds"]):
            timed = [p for p in points if name in p["seconds"]]
            tokens = [p["T"] for p in timed]
            column = lambda key, n=name, h=timed: [1e3 * p["seconds"][n][key] for p in h]
            ax.plot(tokens, column("median"), marker="o", label=LABELS.get(name, name))
            ax.fill_between(tokens, column("p20"), column("p80"), alpha=0.2)
        floor = [1e3 * p["floor_s"] for p in points]
        ax.plot([p["T"] for p in points], floor, "--", color=ink(), label="roofline")
        legend(ax)
        drawn.append(save(figure, out, f"layer-time-{layer}"))
    return drawn


def draw_roofline_share(lines: Lines, out: Path) -> list[Path]:
    """What share of the roofline the layer reaches over T, every shape in one picture."""
    figure, ax = axes(
        of_device("MoE layer", lines[0]),
        "tokens T entering the layer",
        "share of the roofline",
        log_x=True,
    )
    for layer, points in _by_layer(lines).items():
        shares = {p["T"]: p["of_roof"] for p in points if p["routing"] == "uniform"}
        if shares:
            shape, _, _, *more = layer.split()
            label = " ".join((shape, *more))
            ax.plot(list(shares), list(shares.values()), "o-", label=label)
    ax.axhline(1.0, color=ink(), lw=0.8)
    ax.set_ylim(bottom=0.0)
    legend(ax, "E,K,H,I")
    return [save(figure, out, "roofline-share")]


def draw_peer_ratios(lines: Lines, out: Path) -> list[Path]:
    """Seconds of each peer over ours at every T, plain weights: median over shapes, and range."""
    ratios: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    plain = [line for line in lines if stored_as(line) == PLAIN]
    for line in sorted(plain, key=lambda line: line["T"]):
        for name, ratio in line["ratio"].items():
            ratios[name][line["T"]].append(ratio)
    if not ratios:
        return []
    figure, ax = axes(
        of_device("MoE layer", lines[0]),
        "tokens T entering the layer",
        "peer's time / ours",
        log_x=True,
    )
    for name, by_tokens in ratios.items():
        tokens = list(by_tokens)
        column = lambda of, b=by_tokens: [of(values) for values in b.values()]
        ax.plot(tokens, column(statistics.median), "o-", label=LABELS.get(name, name))
        ax.fill_between(tokens, column(min), column(max), alpha=0.15)
    ax.axhline(1.0, color=ink(), lw=0.8)
    ax.set_ylim(bottom=0.0)
    legend(ax)
    return [save(figure, out, "peer-ratios")]


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
        figure, panels = plt.subplots(2, 1, figsize=(4.7, 5.8), sharex=True, layout="constrained")
        for ax, times, title in ((panels[0], seconds, "measured"), (panels[1], floors, "roofline")):
            value = lambda b, g, t=times: t[b, 0] / t[b, g] if (b, g) in t else float("nan")
            grid = [[value(b, g) for b in batches] for g in gammas]
            image = heat_map(ax, grid, batches, gammas, vmin=0, vmax=1)
            ax.set(ylabel="draft length γ", title=title)
        panels[1].set_xlabel("batch B")
        figure.colorbar(image, ax=panels, label="target efficiency")
        figure.suptitle(of_device(layer, points[0]), fontsize=11)
        drawn.append(save(figure, out, f"layer-efficiency-{layer}"))
    return drawn

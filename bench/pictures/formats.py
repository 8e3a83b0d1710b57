"""Target efficiency over B for the weight formats of one layer or model.

Fewer bytes per weight leave more operations per byte: the batch at which verification stops being
nearly free comes sooner, and these pictures show by how much.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.gguf.contents import PLAIN
from bench.pictures.style import Lines, axes, ink, legend, of_device, save
from bench.runs.cells import apart
from moesd_kernels.formats import GROUPS


def stored_as(line: dict[str, Any]) -> str:
    """A line's weight format; lines from before there were several have plain weights."""
    return line.get("weight_format") or PLAIN


def stored_words(line: dict[str, Any]) -> str:
    """The same with the weights that share a scale, where they are not as many as usual."""
    group = line.get("group", GROUPS[0])
    if stored_as(line) == PLAIN or group == GROUPS[0]:
        return stored_as(line)
    return f"{stored_as(line)} {'row' if group is None else f'group {group}'}"


class Curve(NamedTuple):
    """Target efficiency over B: as measured, and what the roofline allows, where it is known."""

    measured: dict[int, float]
    allowed: dict[int, float]


def draw_layer_formats(lines: Lines, out: Path) -> list[Path]:
    """The layer's: solid as measured, dashed the roofline's; a picture per shape and gamma."""
    return _draw(lines, out, "layer-formats", _layer, _layer_curves)


def draw_model_formats(lines: Lines, out: Path) -> list[Path]:
    """A whole step's, of ``decode`` and ``trained`` lines; a picture per target and gamma."""
    return _draw(lines, out, "formats", _model, _model_curves)


def _draw(
    lines: Lines,
    out: Path,
    name: str,
    subject: Callable[[dict[str, Any]], str],
    curves_of: Callable[[Lines], dict[int, Curve]],
) -> list[Path]:
    """Pictures of the subjects that were measured in two formats or more."""
    groups: dict[str, dict[str, Lines]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        groups[subject(line)][stored_words(line)].append(line)
    drawn = []
    for words, formats in groups.items():
        curves = {stored: curves_of(measured) for stored, measured in formats.items()}
        for gamma in sorted({gamma for by_gamma in curves.values() for gamma in by_gamma}):
            chosen = {s: by_gamma[gamma] for s, by_gamma in curves.items() if gamma in by_gamma}
            if len(chosen) > 1:
                first = next(iter(formats.values()))[0]
                figure = _figure(of_device(f"{words}, γ = {gamma}", first), chosen)
                drawn.append(save(figure, out, f"{name}-{words}-gamma{gamma}"))
    return drawn


def _figure(title: str, curves: dict[str, Curve]) -> Any:
    figure, ax = axes(title, "batch B", "target efficiency T(B, 1) / T(B, γ)", log_x=True)
    for stored, curve in sorted(curves.items(), key=lambda item: item[0] != PLAIN):
        batches = sorted(curve.measured)
        (line,) = ax.plot(batches, [curve.measured[b] for b in batches], "o-", label=stored)
        allowed = sorted(curve.allowed)
        color = line.get_color()
        ax.plot(allowed, [curve.allowed[b] for b in allowed], "--", lw=1, color=color)
    ax.axhline(1.0, color=ink(), lw=0.8)
    ax.set_ylim(bottom=0.0)
    legend(ax, "dashed: roofline" if any(c.allowed for c in curves.values()) else None)
    return figure


def _layer(line: dict[str, Any]) -> str:
    words = [",".join(map(str, line["shape"])), line["dtype"], line["routing"]]
    return " ".join(words + [line["backend"]] * (line["backend"] != "auto"))


def _layer_curves(lines: Lines) -> dict[int, Curve]:
    """Curves by gamma of one layer in one format; a point measured again counts as it was last."""
    points = {(line["B"], line["gamma"]): line for line in lines}
    curves: dict[int, Curve] = defaultdict(lambda: Curve({}, {}))
    for (batch, gamma), verified in points.items():
        step = points.get((batch, 0))
        if gamma and step:
            seconds = [line["seconds"]["moesd"]["median"] for line in (step, verified)]
            curves[gamma].measured[batch] = seconds[0] / seconds[1]
            curves[gamma].allowed[batch] = step["floor_s"] / verified["floor_s"]
    return curves


def _model(line: dict[str, Any]) -> str:
    """A target's name without its format: ``smol-q4_0.gguf`` and ``smol-bf16.gguf`` are one."""
    name = line["target"].rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    name = name.removesuffix(f"-{stored_as(line)}").removesuffix("-bf16")
    name = f"{name} K={line['top_k']}" if line.get("top_k") else name
    return " ".join(filter(None, (name, apart(line))))


def _model_curves(lines: Lines) -> dict[int, Curve]:
    """Curves by gamma of one target in one format."""
    curves: dict[int, Curve] = defaultdict(lambda: Curve({}, {}))
    for line in lines:
        curves[line["gamma"]].measured[line["batch"]] = line["target_efficiency"]
    return curves

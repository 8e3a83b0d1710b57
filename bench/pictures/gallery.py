"""Every picture: the kind of line it needs, and all of them drawn at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.measure.fields import whole_lines
from bench.pictures import decode, engine, formats, kernels, trained
from bench.pictures.style import Lines
from bench.runs.cells import TRAINED

Draw = Callable[[Lines, Path], list[Path]]
PICTURES: dict[str, tuple[str, Draw]] = {
    "layer-time": ("kernel", kernels.draw_layer_time),
    "roofline-share": ("kernel", kernels.draw_roofline_share),
    "peer-ratios": ("kernel", kernels.draw_peer_ratios),
    "layer-efficiency": ("kernel", kernels.draw_efficiency_map),
    "layer-formats": ("kernel", formats.draw_layer_formats),
    "trained-speedup": (TRAINED, trained.draw_speedups),
    "trained-acceptance": (TRAINED, trained.draw_acceptance),
    "trained-predicted": (TRAINED, decode.draw_predicted),
    "speedup": ("decode", decode.draw_speedup),
    "target-efficiency": ("decode", decode.draw_target_efficiency),
    "predicted": ("decode", decode.draw_predicted),
    "activation": ("decode", decode.draw_activation),
    "map": ("decode", decode.draw_map),
    "formats": ("decode", formats.draw_model_formats),
    "tokens-per-second": ("generate", engine.draw_tokens_per_second),
    "automatic": ("auto", engine.draw_automatic),
}


def draw_all(sources: list[Path], out: Path) -> list[Path]:
    """Draw every picture for which ``sources`` hold lines.

    Raises:
        ValueError: no line of any known kind.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    for kind, draw in PICTURES.values():
        lines = list(whole_lines(sources, kind))
        if lines:
            drawn += draw(lines, out)
    if not drawn:
        kinds = sorted({kind for kind, _ in PICTURES.values()})
        raise ValueError(f"no lines of kind {', '.join(kinds)} in {', '.join(map(str, sources))}")
    return drawn

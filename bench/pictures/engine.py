"""Pictures of whole runs: tokens per second beside peers, automatic gamma beside fixed ones."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.pictures.formats import PLAIN, stored_as
from bench.pictures.style import Lines, axes, ink, legend, log_y, of_acceptance, of_device, save


def draw_tokens_per_second(lines: Lines, out: Path) -> list[Path]:
    """Tokens per second over B of every variant with its p20-p80 band, a picture per target."""
    targets: dict[str, Lines] = defaultdict(list)
    for line in sorted(lines, key=lambda line: line["B"]):
        targets[line["target"]].append(line)
    drawn = []
    for target, measured in targets.items():
        figure, ax = axes(
            of_device(f"{target}", measured[0]), "batch B", "tokens per second", log_x=True
        )
        log_y(ax)
        for variant in dict.fromkeys(map(_variant, measured)):
            # A batch measured again counts as it was measured last.
            rates = {x["B"]: x["tokens_per_s"] for x in measured if _variant(x) == variant}
            batches = sorted(rates)
            column = lambda key, b=batches, r=rates: [r[batch][key] for batch in b]
            ax.plot(batches, column("median"), "o-", label=variant)
            ax.fill_between(batches, column("p20"), column("p80"), alpha=0.2)
        legend(ax)
        drawn.append(save(figure, out, f"tokens-per-second-{target.rsplit('/', 1)[-1]}"))
    return drawn


def _variant(line: dict[str, Any]) -> str:
    """Who decodes, how its weights are stored where they are quantised, and its inputs rounded."""
    words = [line["variant"]] + [stored_as(line)] * (stored_as(line) != PLAIN)
    return ", ".join(words + ["int8 activations"] * bool(line.get("int8_activations")))


def draw_automatic(lines: Lines, out: Path) -> list[Path]:
    """Speed of automatic gamma over that of the best fixed one, none included, over B."""
    drawn = []
    for target in dict.fromkeys(line["target"] for line in lines):
        figure, ax = axes(
            of_device(target, lines[0]), "batch B", "automatic γ / best fixed γ", log_x=True
        )
        curves: dict[str, dict[int, float]] = defaultdict(dict)
        for line in sorted(lines, key=lambda line: (of_acceptance(line), line["batch"])):
            if line["target"] == target:
                curves[of_acceptance(line)][line["batch"]] = line["against_best"]
        for label, ratios in curves.items():
            ax.plot(list(ratios), list(ratios.values()), "o-", label=label)
        ax.axhline(1.0, color=ink(), lw=0.8)
        legend(ax)
        drawn.append(save(figure, out, f"automatic-{target.rsplit('/', 1)[-1]}"))
    return drawn

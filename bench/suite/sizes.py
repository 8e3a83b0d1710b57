"""How large a suite's measurements are: for a GPU, and dry on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from bench.workloads.shapes import SHAPES, Shape
from decoder.perf_model.presets import preset_spec

# Largest first: the one that fits is measured. The paper's own target heads the list.
PRESETS = ("qwen2-57b-a14b", "qwen3-30b-a3b", "olmoe")
DRAFT = "qwen2-0.5b"
# Beside target and draft: caches, workspaces, captured graphs, and what the allocator wastes.
SPARE_BYTES = 6 * 2**30


@dataclass(frozen=True, slots=True)
class Sizes:
    """Attributes:
    shapes: layers by name, as ``--shape`` takes them.
    points: (sequences, tokens of each) entering a layer, most telling first.
    rounds: replays per point.
    tuned: shape -> values of T to tune, most telling first.
    candidates: tilings tried in each step of a search.
    preset: target's name, or None to choose by free memory.
    scale, draft_scale: share of the parameters to build.
    cells: (B, gammas) of the decode measurement, most telling first.
    prompt_tokens, new_tokens, repetitions: of a decode cell.
    fit_points: cells the performance model is fitted on.
    patience: factor on the seconds a piece wants to see before it begins another point.
    """

    shapes: dict[str, Shape]
    points: tuple[tuple[int, int], ...]
    rounds: int
    tuned: dict[str, tuple[int, ...]]
    candidates: int
    preset: str | None
    scale: float
    draft_scale: float
    cells: tuple[tuple[int, tuple[int, ...]], ...]
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    fit_points: int
    patience: float


FULL = Sizes(
    shapes={name: SHAPES[name] for name in ("qwen3-30b", "qwen2-57b", "mixtral")},
    # (32, 5) is a verification of gamma = 4 beside the step (32, 1).
    points=(
        *((32, 1), (32, 5), (8, 1), (1, 1), (128, 1), (320, 1)),
        *((4, 1), (64, 1), (16, 1), (2, 1), (256, 1)),
    ),
    rounds=11,
    tuned={
        "qwen3-30b": (32, 160, 8, 1, 320, 64, 16, 128, 4, 2, 512),
        "mixtral": (8, 32, 1, 160, 320, 64, 16, 2, 4, 128, 512),
        "qwen2-57b": (32, 160, 8, 1, 320, 64, 16, 128, 4, 2, 512),
    },
    candidates=16,
    preset=None,
    scale=1.0,
    draft_scale=1.0,
    cells=(
        *((B, (4, 2, 1, 6)) for B in (32, 64, 16, 8, 100, 1, 4, 2)),
        *((B, (3, 8)) for B in (32, 64, 16, 8, 100, 1, 4, 2)),
    ),
    prompt_tokens=128,
    new_tokens=32,
    repetitions=2,
    fit_points=21,
    patience=1.0,
)
DRY = Sizes(
    shapes={"dry": Shape(8, 2, 64, 32)},
    points=((4, 1), (4, 3), (1, 1)),
    rounds=3,
    tuned={"dry": (4,)},
    candidates=1,
    preset="qwen3-30b-a3b",
    scale=0.0003,
    draft_scale=0.002,
    cells=tuple((batch, (1, 2, 3)) for batch in (1, 2, 3, 4)),
    prompt_tokens=8,
    new_tokens=8,
    repetitions=1,
    fit_points=10,
    patience=0.1,
)


def fitting_preset(free_bytes: int) -> str:
    """The largest preset whose weights, with the draft's and room to work in, fit.

    Raises:
        ValueError: none does.
    """
    sizes = {name: preset_spec(name).weight_bytes for name in (*PRESETS, DRAFT)}
    for name in PRESETS:
        if sizes[name] + sizes[DRAFT] + SPARE_BYTES <= free_bytes:
            return name
    smallest = (sizes[PRESETS[-1]] + sizes[DRAFT] + SPARE_BYTES) / 2**30
    raise ValueError(
        f"the smallest preset needs {smallest:.0f} GiB of device memory, "
        f"got {free_bytes / 2**30:.0f} GiB free"
    )

"""The paper's rows as workloads: which of its cells, and random models of its architectures."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from bench.workloads.models import random_model
from bench.workloads.scaling import random_eagle, scaled_config
from decoder.perf_model.paper_tables import PaperCell, paper_cells
from decoder.perf_model.presets import PAPER_PAIRS

ARCHITECTURES = ("qwen2-57b-a14b", "mixtral-8x7b", "qwen3-30b-a3b", "opt-30b")
# Rows without a table in the paper: the sigma under which their cost is measured is borrowed.
BORROWED = dict.fromkeys(("qwen3-30b-a3b", "opt-30b"), "qwen2-57b-a14b")
DRAFTS = PAPER_PAIRS | {"qwen3-30b-a3b": "qwen2-0.5b"}


def cells_beside(preset: str, hardware: str) -> list[PaperCell]:
    """The paper's cells to set beside a preset.

    Raises:
        ValueError: the paper has none on that hardware.
    """
    target = BORROWED.get(preset, preset)
    rows = [c for c in paper_cells() if (c.target, c.machine) == (target, hardware)]
    if not rows:
        known = sorted({c.machine for c in paper_cells() if c.target == target})
        raise ValueError(f"the paper has {target} on {', '.join(known)}, not on {hardware!r}")
    return rows


def chosen_cells(
    rows: Collection[PaperCell],
    datasets: Collection[str],
    temperatures: Collection[int],
    gammas: Collection[int],
) -> list[PaperCell]:
    """Those of some data sets, temperatures and draft lengths."""
    return [
        c
        for c in rows
        if c.dataset in datasets and c.temperature in temperatures and c.gamma in gammas
    ]


def random_pair(
    preset: str,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    scale: float = 1.0,
    top_k: int | None = None,
) -> tuple[Any, Any]:
    """Target and draft of an architecture, with random weights.

    Args:
        scale: share of the parameters to build.
        top_k: experts per token of the target, in place of the preset's.
    """
    config = scaled_config(preset, scale)
    if top_k:
        config.num_experts_per_tok = top_k
    target = random_model(config, dtype, device)
    if DRAFTS[preset] == "eagle":
        return target, random_eagle(target)
    config = scaled_config(DRAFTS[preset], scale)
    config.vocab_size = target.config.vocab_size
    return target, random_model(config, dtype, device, seed=1)

"""The paper's rows as workloads: which of its cells, which models, which prompts."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from bench.workloads.models import load_model, random_model
from bench.workloads.prompts import load_prompts
from bench.workloads.scaling import random_eagle, scaled_config
from decoder.embedded import load_pair, target_path
from decoder.model.loading import load_tokenizer
from decoder.perf_model.paper_tables import PaperCell, paper_cells
from decoder.perf_model.presets import PAPER_PAIRS

PRESETS = ("qwen2-57b-a14b", "mixtral-8x7b", "qwen3-30b-a3b", "opt-30b", "embedded")
# Rows without a table in the paper: the sigma under which their cost is measured is borrowed.
BORROWED = dict.fromkeys(("qwen3-30b-a3b", "opt-30b", "embedded"), "qwen2-57b-a14b")
DRAFTS = PAPER_PAIRS | {"qwen3-30b-a3b": "qwen2-0.5b"}
DATA_SETS = {"humaneval": "humaneval", "mt_bench": "mt-bench"}  # the paper's name -> ours


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
    data: str | None,
    temperature: int | None,
    gammas: Collection[int],
) -> list[PaperCell]:
    """Those of a data set, a temperature (None: any) and some draft lengths."""
    return [
        c
        for c in rows
        if data in (None, c.dataset) and temperature in (None, c.temperature) and c.gamma in gammas
    ]


def data_prompts(preset: str, target: Path | None, data: str) -> list[list[int]]:
    """A data set's prompts in the tokens of a trained target."""
    path = target_path() if preset == "embedded" else target
    assert path is not None  # there is a trained target
    tokenizer = load_tokenizer(path)
    return [tokenizer(text)["input_ids"] for text in load_prompts(DATA_SETS[data])]


def preset_models(
    preset: str,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    target: Path | None = None,
    draft: Path | None = None,
    scale: float = 1.0,
    top_k: int | None = None,
) -> tuple[Any, Any]:
    """Target and draft of a preset.

    Args:
        target: the target's weights on disk; without them random ones are drawn.
        draft: the draft's.
        scale: share of the parameters to build of what is random.
        top_k: experts per token of a random target, in place of the preset's.
    """
    if preset == "embedded":
        model, small, _ = load_pair(dtype)
        return model, small
    if target:
        built: Any = load_model(str(target), dtype, device)
    else:
        config = scaled_config(preset, scale)
        if top_k:
            config.num_experts_per_tok = top_k
        built = random_model(config, dtype, device)
    if draft:
        return built, load_model(str(draft), dtype, device)
    if DRAFTS[preset] == "eagle":
        return built, random_eagle(built)
    config = scaled_config(DRAFTS[preset], scale)
    config.vocab_size = built.config.vocab_size
    return built, random_model(config, dtype, device, seed=1)

"""Checkpoints of tiny models in the layouts that exist, and what reading experts should do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_model

from decoder.offload import Offload

PAGES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96}  # whole pages
Run = tuple[int, Sequence[int]]  # a layer, and the experts that its tokens were sent to


def saved(folder: Path, family: str, dtype: torch.dtype, **changes: Any) -> Path:
    """A model whose experts fill whole pages, in transformers' own files."""
    tiny_model(family, dtype, **PAGES, **changes).save_pretrained(folder)
    return folder


def fused(folder: Path, to: Path, family: str, dtype: torch.dtype) -> Path:
    """The same model with all experts of a layer in one tensor, as it is in memory."""
    state = tiny_model(family, dtype, **PAGES).state_dict()
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({k: v.contiguous() for k, v in state.items()}, to / "model.safetensors")
    return to


def expert_bytes(folder: Path) -> int:
    """Of one expert of a model of eight."""
    return experts_bytes(folder) // 16


def experts_bytes(folder: Path) -> int:
    """Of all routed experts' weights."""
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return sum(t.nbytes for file in files for n, t in file.items() if ".experts." in n)


def places(folder: Path, count: int) -> Offload:
    """A budget for so many experts."""
    return Offload(count * expert_bytes(folder))


def simulated_misses(runs: Iterable[Run], layers: int, room: int) -> int:
    """Experts that are read in these runs of layers, by the rule of ``residency.py`` alone."""
    held: dict[tuple[int, int], tuple[int, int]] = {}  # expert -> last run that used it, tokens
    count = [0] * layers
    misses = 0
    for layer, ids in runs:
        count[layer] += 1
        wanted = {(layer, e) for e in ids}
        new = wanted - held.keys()
        misses += len(new)

        def stays(
            key: tuple[int, int], now: int = layer, use: Any = held, runs_so_far: Any = count
        ) -> Any:
            run, tokens = use[key]
            until = (key[0] - now - 1) % layers
            return run - runs_so_far[key[0]], -until, tokens, -key[0], -key[1]

        over = max(0, len(held) + len(new) - room)
        for key in sorted(held.keys() - wanted, key=stays)[:over]:
            del held[key]
        for key in wanted:
            held[key] = count[layer], list(ids).count(key[1])
    return misses

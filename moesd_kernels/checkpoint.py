"""Reads one MoE block's tensors out of a Hugging Face checkpoint.

Two generations of names exist: one tensor per expert and projection, which are stacked here
(``experts.3.gate_proj.weight``; Mixtral says ``w1``, ``w3``, ``w2``), and transformers v5's fused
tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

# The block's own folder in Mixtral's checkpoints, and parts that other families name differently.
_RENAMES = (
    (re.compile(r"^block_sparse_moe\."), ""),
    (re.compile(r"^router\."), "gate."),
    (re.compile(r"^shared_experts\."), "shared_expert."),
)
_EXPERT = re.compile(r"^experts\.(\d+)\.(\w+)\.weight$")
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Every tensor below ``prefix``, with the prefix removed and parts under our names.

    Args:
        path: a safetensors file or a folder of them; a folder's index says which files to open.
        prefix: what the names must start with.

    Raises:
        FileNotFoundError: nothing to read at ``path``.
    """
    from safetensors import safe_open

    tensors = {}
    for file in _files(path, prefix):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                if name.startswith(prefix):
                    tensors[_rename(name.removeprefix(prefix))] = opened.get_tensor(name)
    return tensors


def _files(path: Path, prefix: str) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return sorted({path / f for name, f in weight_map.items() if name.startswith(prefix)})
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file at {path}")
    return files


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def block_state(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], prefix: str
) -> dict[str, Tensor]:
    """The block's state dict: per-expert tensors stacked, shapes checked.

    Args:
        tensors: from ``read_tensors``.
        wanted: name -> shape of every tensor the block has.
        prefix: for messages.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a shape does not fit.
    """
    state = {name: tensor for name, tensor in tensors.items() if not _EXPERT.match(name)}
    state |= _stack_experts(tensors)
    for name, shape in wanted.items():
        if name not in state:
            raise KeyError(f"checkpoint has no {prefix}{name}, got {sorted(state)}")
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{prefix}{name} must be {shape}, got {tuple(state[name].shape)}")
    return {name: state[name] for name in wanted}


def _stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``experts.gate_up_proj`` and ``experts.down_proj`` from one tensor per expert."""
    parts: dict[str, dict[int, Tensor]] = {"gate_proj": {}, "up_proj": {}, "down_proj": {}}
    for name, tensor in tensors.items():
        match = _EXPERT.match(name)
        if match:
            projection = _PROJECTIONS.get(match[2], match[2])
            parts[projection][int(match[1])] = tensor
    if not parts["down_proj"]:
        return {}
    experts = range(len(parts["down_proj"]))
    gate_up = [torch.cat([parts["gate_proj"][e], parts["up_proj"][e]]) for e in experts]
    return {
        "experts.gate_up_proj": torch.stack(gate_up),
        "experts.down_proj": torch.stack([parts["down_proj"][e] for e in experts]),
    }

"""Reads one MoE block's tensors out of a Hugging Face checkpoint.

Two generations of names exist: one tensor per expert and projection, which are stacked here
(``experts.3.gate_proj.weight``; Mixtral says ``w1``, ``w3``, ``w2``), and transformers v5's fused
tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
_PARTS = ("gate.", "experts.", "shared_expert.", "shared_expert_gate.")


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Every tensor below ``prefix``, with the prefix removed and parts under our names.

    Args:
        path: a safetensors file or a folder of them; a folder's index says which files to open.
        prefix: what the names must start with.

    Raises:
        FileNotFoundError: nothing to read at ``path``.
        ValueError: a file cannot be read, the index names one outside the folder, or two tensors
            have one name.
    """
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for file in _files(path, prefix):
        with _readable(file), safe_open(file, framework="pt") as opened:
            for full_name in opened.keys():  # noqa: SIM118 - not a mapping
                if not full_name.startswith(prefix):
                    continue
                name = _rename(full_name.removeprefix(prefix))
                if name in tensors:
                    raise ValueError(f"{full_name} is a second {name}")
                tensors[name] = opened.get_tensor(full_name)
    return tensors


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error


def _files(path: Path, prefix: str) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [path / name for name in _indexed(index, prefix)]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file at {path}")
    return files


def _indexed(index: Path, prefix: str) -> list[str]:
    with _readable(index):
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict):
            raise ValueError("expected an object with a weight_map")
        names = sorted({str(f) for name, f in weight_map.items() if name.startswith(prefix)})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"it must name safetensors files of its folder, got {name!r}")
    return names


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    if match := _EXPERT.match(name):
        name = f"experts.{match[1]}.{_PROJECTIONS.get(match[2], match[2])}.weight"
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
        ValueError: a shape or type does not fit, or a part of the block is left over.
    """
    experts, state = _stack_experts(tensors, prefix)
    for name in tensors.keys() - experts:
        if name in state:
            raise ValueError(f"{prefix}{name} is there twice: joined, and one tensor per expert")
        state[name] = tensors[name]
    for name, shape in wanted.items():
        if name not in state:
            raise KeyError(f"checkpoint has no {prefix}{name}, got {sorted(state)[:9]}")
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{prefix}{name} must be {shape}, got {tuple(state[name].shape)}")
        if not state[name].is_floating_point() or state[name].element_size() < 2:
            raise ValueError(
                f"{prefix}{name} must be fp64, fp32, fp16 or bf16, got {state[name].dtype}"
            )
    left = sorted(name for name in state.keys() - wanted.keys() if name.startswith(_PARTS))
    if left:
        raise ValueError(f"the config has no place for {prefix}{left[0]}, one of {len(left)}")
    return {name: state[name] for name in wanted}


def _stack_experts(
    tensors: Mapping[str, Tensor], prefix: str
) -> tuple[set[str], dict[str, Tensor]]:
    """Names of single experts' projections, and the two tensors that they make."""
    parts: dict[str, dict[int, Tensor]] = {"gate_proj": {}, "up_proj": {}, "down_proj": {}}
    names = set()
    for name, tensor in tensors.items():
        match = _EXPERT.match(name)
        if match and match[2] in parts:
            names.add(name)
            parts[match[2]][int(match[1])] = tensor
    if not names:
        return names, {}
    count = max(len(experts) for experts in parts.values())
    gate, up, down = (_stack(experts, part, count, prefix) for part, experts in parts.items())
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"{prefix}experts.*.up_proj must be as gate_proj, {tuple(gate.shape[1:])} "
            f"{gate.dtype}, got {tuple(up.shape[1:])} {up.dtype}"
        )
    joined = torch.cat([gate, up], dim=1)
    return names, {"experts.gate_up_proj": joined, "experts.down_proj": down}


def _stack(experts: Mapping[int, Tensor], part: str, count: int, prefix: str) -> Tensor:
    for index in range(count):
        name = f"{prefix}experts.{index}.{part}.weight"
        if index not in experts:
            raise KeyError(f"checkpoint has no {name}, and {count} experts")
        first, this = experts[0], experts[index]
        if this.ndim != 2 or this.shape != first.shape or this.dtype != first.dtype:
            raise ValueError(
                f"{name} must be a matrix as expert 0's, {tuple(first.shape)} {first.dtype}, got "
                f"{tuple(this.shape)} {this.dtype}"
            )
    return torch.stack([experts[index] for index in range(count)])

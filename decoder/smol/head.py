"""The EAGLE-3 head as the repository keeps it: 8-bit rows, without what the target can give it.

Matrices are int8 with an fp32 scale per output row (``{name}`` and ``{name}.scale``), norms stay
bf16, ``d2t`` is int32. The projection onto the draft vocabulary is rows of the target's and is not
kept, ``t2d`` follows from ``d2t``, and the configuration is text in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LARGEST = 127
_CONFIG = "config"
_FROM_TARGET = ("lm_head.weight", "t2d")


def write_head(file: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write the file from what was trained.

    Args:
        file: where to; overwritten.
        state: the published layout's names: ``fc.weight``, ``midlayer.*``, ``norm.weight`` in
            floating point and ``d2t`` ``[draft vocabulary]`` integers, target id - draft id;
            ``lm_head.weight`` and ``t2d`` are left out.
        config: what ``config.json`` will hold.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if name == "d2t":
            tensors[name] = tensor.int()
        elif name not in _FROM_TARGET and tensor.ndim == 1:
            tensors[name] = tensor.bfloat16()
        elif name not in _FROM_TARGET:
            tensor = tensor.float()
            scale = tensor.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
            tensors[name] = (tensor / scale[:, None]).round().to(torch.int8)
            tensors[f"{name}.scale"] = scale
    save_file(tensors, file, metadata={_CONFIG: json.dumps(config)})


def read_head(file: Path, output: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The head in the published layout.

    Args:
        file: from ``write_head``.
        output: ``[V, H]``, the target's output projection.

    Returns:
        Its tensors, bf16 apart from ``d2t`` int64 and ``t2d`` bool ``[V]``, and its configuration.

    Raises:
        OSError: it cannot be read.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        config = json.loads(opened.metadata()[_CONFIG])
        kept = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    state = {}
    for name, tensor in kept.items():
        if tensor.dtype == torch.int8:
            state[name] = (tensor.float() * kept[f"{name}.scale"][:, None]).bfloat16()
        elif tensor.dtype == torch.bfloat16:
            state[name] = tensor
    state["d2t"] = kept["d2t"].long()
    targets = state["d2t"] + torch.arange(len(state["d2t"]))
    state["lm_head.weight"] = output[targets].bfloat16()
    state["t2d"] = torch.zeros(len(output), dtype=torch.bool).index_fill(0, targets, True)
    return state, config

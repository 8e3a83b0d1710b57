"""The draft's file: the dense model's, with the scales of its 4-bit blocks tuned to the target.

A Q4_1 block of 32 weights is ``scale * code + least``. The repository keeps how both change, for
tensors t of R rows and B blocks a row, in the file's order of rows:

* ``{t}.scale``: by what share of themselves a block's weights grow
* ``{t}.least``: what is added to them after that

each as ``int4`` of ``moesd_kernels.formats``, 32 of the flattened changes to a scale: uint8
``[R * B / 2]``, and bf16 ``[R * B / 32]`` under the name with ``.step`` behind it.

Codes and everything else stay, so the draft costs what the dense model costs.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from decoder.errors import UserError
from decoder.model.kernels import from_int4, gguf_file, to_int4

TUNED_FILE = "draft.gguf"
_PARTS = ("scale", "least")
_BYTES = 20  # of a block: fp16 scale and least, then the codes


def write_changes(file: Path, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write the repository's file from what was trained.

    Args:
        file: where to; overwritten.
        changes: by the GGUF file's names, floating ``[R, B]``: by what share of themselves a
            block's weights grow, and what is added to them after that.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, pair in changes.items():
        for part, change in zip(_PARTS, pair, strict=True):
            codes, steps = to_int4(change.detach().float().cpu().flatten())
            tensors |= {f"{name}.{part}": codes, f"{name}.{part}.step": steps}
    save_file(tensors, file)


def write_tuned(dense: Path, changes: Path, out: Path) -> None:
    """Write the draft's GGUF file.

    Args:
        dense: the dense model's file.
        changes: from ``write_changes``.
        out: where to; overwritten.

    Raises:
        UserError: the changes are not of this file.
        OSError: a file cannot be read or written.
    """
    from safetensors.torch import load_file

    kept = load_file(changes)
    stored = gguf_file(dense).tensors
    names = sorted(name.removesuffix(".scale") for name in kept if name.endswith(".scale"))
    for name in names:
        tensor, changed = stored.get(name), kept[f"{name}.scale"]
        if tensor is None or tensor.kind != "q4_1" or 2 * changed.numel() * _BYTES != tensor.size:
            raise UserError(
                f"{changes} must hold changes of Q4_1 tensors of {dense}, got {name} "
                f"{tuple(changed.shape)}"
            )
    shutil.copyfile(dense, out)
    data = torch.from_file(str(out), shared=True, size=out.stat().st_size, dtype=torch.uint8)
    for name in names:
        tensor = stored[name]
        blocks = data[tensor.start : tensor.start + tensor.size].view(-1, _BYTES)
        scale, least = blocks[:, :4].contiguous().view(torch.float16).float().unbind(1)
        growth, added = (
            from_int4(kept[f"{name}.{part}"], kept[f"{name}.{part}.step"]) for part in _PARTS
        )
        tuned = torch.stack([scale * (growth + 1), least * (growth + 1) + added], dim=1)
        blocks[:, :4] = tuned.to(torch.float16).view(torch.uint8)

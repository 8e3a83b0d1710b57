"""The argmax every decision ends with."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64


def first_argmax(values: Tensor) -> Tensor:
    """Index of the largest value along the last dimension, the lowest one among equals.

    On the CPU ``torch.argmax`` is scalar code, about 20 times slower than ``amax``, which is
    vectorised: the maximum of every block is found first, then the place inside one block.

    Args:
        values: ``[..., V]`` floating; NaN counts as the largest, as for ``torch.argmax``.

    Returns:
        ``[...]`` int64.
    """
    V = values.shape[-1]
    if values.device.type != "cpu" or V % _BLOCK or V < 4 * _BLOCK:
        return values.argmax(dim=-1)
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    blocks = values.unflatten(-1, (V // _BLOCK, _BLOCK))
    best = blocks.amax(dim=-1).argmax(dim=-1, keepdim=True)  # [..., 1]
    index = best[..., None].expand(*best.shape, _BLOCK)
    inside = blocks.gather(-2, index)[..., 0, :].argmax(dim=-1)
    return best[..., 0] * _BLOCK + inside

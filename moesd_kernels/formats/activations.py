"""Activations of eight bits, for products with weights that are stored as integers."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32  # adjacent activations of a row that share a scale
_LARGEST = 127
_SMALLEST = 1e-36  # of a group's magnitudes: the inverse of a smaller one is not finite in fp32


def round_to_int8(x: Tensor) -> Tensor:
    """The numbers that ``x`` becomes: the nearest of 255 in each group, ties to even.

    A group's scale is its largest magnitude over 127; a group that holds infinity or NaN has no
    finite number. Source: Q8_0 of ggml (``quantize_row_q8_0_ref``), with scales in fp32.

    Args:
        x: [..., C], floating, C a multiple of 32.

    Returns:
        [..., C] fp32.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    most = groups.abs().amax(dim=-1, keepdim=True)
    # Not 127 / most: torch multiplies by a reciprocal, which rounds twice.
    inverse = torch.full_like(most, _LARGEST).div(most).where(most >= _SMALLEST, 0)
    return (torch.round(groups * inverse) * (most / _LARGEST)).flatten(-2)

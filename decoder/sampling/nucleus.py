"""Where top-p cuts a row, found without sorting the vocabulary: for accelerators without Triton.

The nucleus is the smallest set of most probable tokens whose sum reaches top-p, ties with its last
token included. That token's probability is the smallest value v of the row such that the values
above v sum to less than top-p; sums only shrink as v grows, so v can be searched for. Floats of one
sign order as their bits do, hence a search over integers.

Each value is rounded to a multiple of 2**-52 before it is summed, less than the rounding of a sum
itself. Every partial sum below 2 is then exact in fp64, so a cut depends on its row alone: not on
the other rows, the order of the summation or the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bisected_threshold(probs: Tensor, top_p: Tensor) -> Tensor:
    """Smallest probability of each row's nucleus.

    Args:
        probs: ``[..., V]`` fp32 or fp64, non-negative, rows of a sum below 2.
        top_p: ``[..., 1]`` fp64, broadcast over the rows; above 1 keeps all.

    Returns:
        ``[..., 1]`` in the dtype of ``probs``; 0 where all is kept. No host synchronisation.
    """
    integer, steps = (torch.int64, 62) if probs.dtype == torch.float64 else (torch.int32, 31)
    bits = probs.contiguous().view(integer)
    mass = (probs.double() + 1.0) - 1.0
    low, high = bits.aminmax(dim=-1, keepdim=True)
    for _ in range(steps):
        middle = low + (high - low) // 2
        fits = torch.where(bits > middle, mass, 0.0).sum(dim=-1, keepdim=True) < top_p
        low, high = torch.where(fits, low, middle + 1), torch.where(fits, middle, high)
    # An undefined row's search ends anywhere; its comparisons are all false.
    return low.view(probs.dtype).masked_fill(top_p > 1, 0.0)

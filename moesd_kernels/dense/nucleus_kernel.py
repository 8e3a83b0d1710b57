"""Top-p without a sort: a row's cut is searched for on the bits of its probabilities.

The definition is ``decoder.sampling.nucleus``'s, and so are the results, bit for bit. Not run on a
GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # 8 values of each of 512 threads, in flight together
NUM_WARPS = 16
# Values below it may have bits beyond 2**-52, which adding it and taking it away rounds off.
SMALL = tl.constexpr(2.0**-29)


@triton.jit
def _nucleus_kernel(
    bits_ptr,  # [R, V] int32, of fp32 probabilities
    top_p_ptr,  # [R] fp64
    out_ptr,  # [R] int32
    V,
    BLOCK: tl.constexpr,
):
    """Grid: (R,). Each pass over the row quarters the interval that holds the cut."""
    row = tl.program_id(0)
    row_ptr = bits_ptr + row.to(tl.int64) * V
    top_p = tl.load(top_p_ptr + row)
    keeps_all = top_p > 1.0
    stop = tl.where(keeps_all, 0, V)  # such rows read nothing
    lowest = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    highest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, stop, BLOCK):
        column = start + tl.arange(0, BLOCK)
        bits = tl.load(row_ptr + column, mask=column < V, other=0)
        lowest = tl.minimum(lowest, tl.where(column < V, bits, 0x7FFFFFFF))
        highest = tl.maximum(highest, bits)
    low = tl.where(keeps_all, 0, tl.min(lowest))
    high = tl.where(keeps_all, 0, tl.max(highest))
    while low < high:
        a = low + (high - low) // 4
        b = low + (high - low) // 2
        c = b + (high - low) // 4
        above_a = tl.zeros([BLOCK], tl.float64)
        above_b = tl.zeros([BLOCK], tl.float64)
        above_c = tl.zeros([BLOCK], tl.float64)
        for start in range(0, stop, BLOCK):
            column = start + tl.arange(0, BLOCK)
            bits = tl.load(row_ptr + column, mask=column < V, other=0)
            probs = bits.to(tl.float32, bitcast=True)
            mass = tl.where(probs < SMALL, (probs + SMALL) - SMALL, probs).to(tl.float64)
            above_a += tl.where(bits > a, mass, 0.0)
            above_b += tl.where(bits > b, mass, 0.0)
            above_c += tl.where(bits > c, mass, 0.0)
        fits_a = tl.sum(above_a) < top_p
        fits_b = tl.sum(above_b) < top_p
        fits_c = tl.sum(above_c) < top_p
        low = tl.where(fits_a, low, tl.where(fits_b, a, tl.where(fits_c, b, c)) + 1)
        high = tl.where(fits_a, a, tl.where(fits_b, b, tl.where(fits_c, c, high)))
    tl.store(out_ptr + row, low)


def nucleus_threshold(probs: Tensor, top_p: Tensor) -> Tensor:
    """Smallest probability of each row's nucleus.

    Args:
        probs: ``[..., V]`` fp32, non-negative, rows of a sum below 2.
        top_p: ``[..., 1]`` fp64, broadcast over the rows; above 1 keeps all.

    Returns:
        ``[..., 1]`` fp32; 0 where all is kept.
    """
    V = probs.shape[-1]
    rows = probs.reshape(-1, V)
    limits = top_p.expand(*probs.shape[:-1], 1).reshape(-1)
    out = torch.empty(rows.shape[0], dtype=torch.int32, device=probs.device)
    if rows.numel():
        grid = (rows.shape[0],)
        _nucleus_kernel[grid](
            rows.view(torch.int32), limits, out, V, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    return out.view(torch.float32).view(*probs.shape[:-1], 1)

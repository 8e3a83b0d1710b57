"""Where a row is cut, found without sorting it: a search on the bits of its values.

Top-k and top-p keep the largest values until they have weighed enough, and all that tie with the
last one. That one is the smallest value v such that the values above v weigh less than the limit;
sums only shrink as v grows, so v can be searched for. Values order as integers made of their bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..argmax_kernel import NOTHING, order

# Values below it may have bits beyond 2**-52, which adding it and taking it away rounds off.
_SMALL = tl.constexpr(2.0**-29)


@triton.jit
def mass(probs):
    """fp32 probabilities as fp64 multiples of 2**-52: sums below 2 are exact in any order."""
    return tl.where(probs < _SMALL, (probs + _SMALL) - _SMALL, probs).to(tl.float64)


@triton.jit
def value_of(ordered):
    """The fp32 number that ``order`` made an int32 of (of both zeros, +0)."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def last_kept(values_ptr, V, low, high, limit, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """Order of the smallest value of a row above which the values weigh less than ``limit``.

    Each weighs 1 where COUNTS, otherwise its mass. The result is the lowest int64 from ``low`` to
    ``high`` that fits; nothing is read where the two are equal. Each pass quarters what is left.
    """
    DTYPE: tl.constexpr = tl.int32 if COUNTS else tl.float64
    while low < high:
        a = low + (high - low) // 4
        b = low + (high - low) // 2
        c = b + (high - low) // 4
        above_a = tl.zeros([BLOCK], DTYPE)
        above_b = tl.zeros([BLOCK], DTYPE)
        above_c = tl.zeros([BLOCK], DTYPE)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + column, mask=column < V, other=0.0)
            weight = tl.full([BLOCK], 1, tl.int32) if COUNTS else mass(values)
            ordered = tl.where(column < V, order(values), NOTHING)
            above_a += tl.where(ordered > a.to(tl.int32), weight, 0)
            above_b += tl.where(ordered > b.to(tl.int32), weight, 0)
            above_c += tl.where(ordered > c.to(tl.int32), weight, 0)
        fits_a = tl.sum(above_a) < limit
        fits_b = tl.sum(above_b) < limit
        fits_c = tl.sum(above_c) < limit
        low = tl.where(fits_a, low, tl.where(fits_b, a, tl.where(fits_c, b, c)) + 1)
        high = tl.where(fits_a, a, tl.where(fits_b, b, tl.where(fits_c, c, high)))
    return low.to(tl.int32)

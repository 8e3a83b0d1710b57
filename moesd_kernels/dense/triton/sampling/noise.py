"""The counter-based noise of ``decoder.sampling.rng`` in registers: the same bits.

The words of each hash are equal to the last bit; an exponential is within a few roundings of
PyTorch's, whose logarithm is another.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Streams of ``decoder.sampling.rng.Stream``.
DRAFT = tl.constexpr(0)
ACCEPT = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)
TARGET = tl.constexpr(3)

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_GOLDEN_32 = tl.constexpr(0x9E3779B9)
_LARGEST_BELOW_ONE = tl.constexpr(1 - 2.0**-24)


@triton.jit
def _mix_64(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def fold(seed, data):
    """A new seed from a seed and an integer, int64."""
    return _mix_64(_mix_64(seed.to(tl.uint64) + _GOLDEN) + (data + 1).to(tl.uint64) * _GOLDEN)


@triton.jit
def key_of(seed, position, STREAM: tl.constexpr):
    """The 64-bit key of a seed, an int64 position and a stream."""
    stream_key = _mix_64(_mix_64(seed.to(tl.uint64) + _GOLDEN) ^ (STREAM + 1))
    return _mix_64(stream_key + (position + 1).to(tl.uint64) * _GOLDEN)


@triton.jit
def uniform(key):
    """fp64 strictly between 0 and 1."""
    return ((key >> 13).to(tl.float64) + 0.5) * (2.0**-51)


@triton.jit
def exponential(key, ids):
    """Exp(1) of each of the vocabulary's ``ids``, int32, for one key: fp32, positive, finite."""
    upper = (key >> 32).to(tl.uint32)
    x = ids.to(tl.uint32) * _GOLDEN_32 + key.to(tl.uint32)
    x = (x ^ (x >> 17)) * 0xED5AD4BB + upper
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    x = x ^ (x >> 14)
    low = ((x * _GOLDEN_32) ^ upper) & 0x7FFFFFFF | 1
    u = ((x & 0x7FFFFFFF).to(tl.float32) + low.to(tl.float32) * (2.0**-31)) * (2.0**-31)
    return _minus_log1m(tl.minimum(u, _LARGEST_BELOW_ONE))


@triton.jit
def _minus_log1m(u):
    """``-log(1 - u)``. What 1 - u rounds off is given back by the ratio of u to 1 - (1 - u)."""
    rest = 1.0 - u
    taken = 1.0 - rest
    return tl.where(taken == 0.0, u, -tl.log(rest) * (u / tl.where(taken == 0.0, 1.0, taken)))

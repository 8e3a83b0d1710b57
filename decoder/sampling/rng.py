"""Counter-based randomness: hashes of (seed, position, stream, vocabulary id), no state.

A speculative round decides several positions at once and may throw some of them away, and a batch
changes while a request runs. A generator with state would make a request's tokens depend on all of
that; a hash of what is being decided does not. Integer arithmetic only, in wrapping two's
complement, so every device computes the same bits.

The 64-bit part (splitmix64's finaliser) works on ``[B, Q]`` keys. The vocabulary-sized part is a
32-bit hash with a 64-bit key, because vector units multiply 32-bit lanes: on AVX2 it is about 20
times faster than the 64-bit one, and two words together still give each uniform 62 bits.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_GOLDEN_32 = -0x61C88647  # 0x9E3779B9
_LARGEST_BELOW_ONE = 1 - 2.0**-24  # fp32


class Stream(IntEnum):
    """Independent random sequences of one request.

    Drafting and verifying must not share noise under rejection sampling (the ratio test assumes an
    independent uniform); they must share it when coupled, where all draws use ``TARGET``.
    """

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    TARGET = 3


def uniform(seeds: Tensor, positions: Tensor, stream: Stream) -> Tensor:
    """One uniform number per row and position, strictly between 0 and 1.

    Args:
        seeds: ``[B]`` int64.
        positions: ``[B]`` or ``[B, Q]`` int64.
        stream: which of the request's sequences.

    Returns:
        fp64 of ``positions``' shape; multiples of 2**-52, none of them 0 or 1.
    """
    bits = _shift_right(key(seeds, positions, stream), 13, 64)  # 51 bits
    return (bits.double() + 0.5) * 2.0**-51


def exponential(seeds: Tensor, positions: Tensor, vocab_size: int, stream: Stream) -> Tensor:
    """One Exp(1) number per row, position and vocabulary id: the clocks of an exponential race.

    ``argmax(probs / exponential)`` is a draw from ``probs`` (normalised or not), and the same draw
    as ``argmax(log(probs) + gumbel)``.

    Args:
        seeds: ``[B]`` int64.
        positions: ``[B]`` or ``[B, Q]`` int64.
        vocab_size: V.
        stream: which of the request's sequences.

    Returns:
        ``[*positions.shape, V]`` fp32, positive and finite. Small values, which decide the race,
        come from small uniforms and so have full relative precision.
    """
    return exponential_of(key(seeds, positions, stream), vocab_size)


def exponential_of(keys: Tensor, vocab_size: int) -> Tensor:
    """``exponential`` for given ``keys`` of any shape: ``[*keys.shape, V]`` fp32."""
    high, low = _vocab_words(keys, vocab_size)
    u = high.float().add_(low.float(), alpha=2.0**-31).mul_(2.0**-31)
    return u.clamp_(max=_LARGEST_BELOW_ONE).neg_().log1p_().neg_()


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int, stream: Stream) -> Tensor:
    """Standard Gumbel noise, ``-log`` of ``exponential`` with the same arguments."""
    return exponential(seeds, positions, vocab_size, stream).log_().neg_()


def fold(seeds: Tensor, data: Tensor) -> Tensor:
    """New seeds ``[B]`` from seeds and an integer per row, each pair its own."""
    return _mix_64(_mix_64(seeds + _GOLDEN) + (data + 1) * _GOLDEN)


def key(seeds: Tensor, positions: Tensor, stream: Stream) -> Tensor:
    """64-bit keys of ``positions``' shape; for a fixed seed and stream injective in position."""
    stream_key = _mix_64(_mix_64(seeds + _GOLDEN) ^ (int(stream) + 1))
    if positions.dim() == 2:
        stream_key = stream_key[:, None]
    return _mix_64(stream_key + (positions + 1) * _GOLDEN)


def _vocab_words(keys: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Two 31-bit words per key and vocabulary id, the second odd.

    Source: the three-round mixer is Chris Wellons' "triple32" (hash-prospector, public domain);
    the key's upper half enters between its rounds, so that two keys whose lower halves are close
    do not give shifted copies of one sequence.
    """
    lower = keys.to(torch.int32)[..., None]
    upper = (keys >> 32).to(torch.int32)[..., None]
    ids = torch.arange(vocab_size, dtype=torch.int32, device=keys.device)
    x = ids * _GOLDEN_32 + lower
    _xor_shift_(x, 17).mul_(_signed_32(0xED5AD4BB)).add_(upper)
    _xor_shift_(x, 11).mul_(_signed_32(0xAC4C1B51))
    _xor_shift_(x, 15).mul_(_signed_32(0x31848BAB))
    _xor_shift_(x, 14)
    low = (x * _GOLDEN_32).bitwise_xor_(upper).bitwise_and_(0x7FFFFFFF).bitwise_or_(1)
    return x.bitwise_and_(0x7FFFFFFF), low


def _mix_64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30, 64)) * _MIX_1
    x = (x ^ _shift_right(x, 27, 64)) * _MIX_2
    return x ^ _shift_right(x, 31, 64)


def _xor_shift_(x: Tensor, count: int) -> Tensor:
    return x.bitwise_xor_(_shift_right(x, count, 32))


def _shift_right(x: Tensor, count: int, width: int) -> Tensor:
    # `>>` copies the sign bit in; the mask makes the shift logical.
    return (x >> count).bitwise_and_((1 << (width - count)) - 1)


def _signed_32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value

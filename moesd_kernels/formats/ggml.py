"""The blocks of GGUF files: scale, minimum and codes of 32 or 256 weights, side by side.

Source: ``ggml-common.h`` and ``ggml-quants.c`` of ggml (block_q8_0, block_q4_0, block_q4_1,
block_q5_0, block_q5_1, block_q4_K, block_q5_K, block_q6_K). All fp16 numbers are little-endian.
Products with fp16 scales are exact in fp32, so a value is rounded at most once, where a minimum is
added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .description import WeightFormat


def _blocks(weight: Tensor, size: int) -> Tensor:
    """Rows ``[..., bytes]`` as blocks [..., bytes / size, size]."""
    return weight.unflatten(-1, (-1, size))


def _half(pair: Tensor) -> Tensor:
    """fp16 numbers [..., 2] bytes as fp32 [..., 1]."""
    return pair.clone(memory_format=torch.contiguous_format).view(torch.float16).float()


def _halves(codes: Tensor) -> Tensor:
    """Bytes [..., n] as 2n codes: all the low nibbles, then all the high ones."""
    return torch.cat((codes & 15, codes >> 4), dim=-1)


def decode_q8_0(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """``d * q``: fp16 d, then 32 int8 q.

    Args:
        weight: ``[..., R, C / 32 * 34]`` uint8.
        scale: not used.

    Returns:
        ``[..., R, C]`` fp32.
    """
    block = _blocks(weight, 34)
    return (_half(block[..., :2]) * block[..., 2:].view(torch.int8).float()).flatten(-2)


def decode_q4_0(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """``d * (q - 8)``: fp16 d, then 16 bytes; byte j holds weights j (low nibble) and j + 16.

    Args:
        weight: ``[..., R, C / 32 * 18]`` uint8.
        scale: not used.

    Returns:
        ``[..., R, C]`` fp32.
    """
    block = _blocks(weight, 18)
    return (_half(block[..., :2]) * (_halves(block[..., 2:]).float() - 8)).flatten(-2)


def decode_q4_1(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """``d * q + m``: fp16 d and m, then 16 bytes as in q4_0.

    Args:
        weight: ``[..., R, C / 32 * 20]`` uint8.
        scale: not used.

    Returns:
        ``[..., R, C]`` fp32.
    """
    block = _blocks(weight, 20)
    scaled = _half(block[..., :2]) * _halves(block[..., 4:]).float()
    return (scaled + _half(block[..., 2:4])).flatten(-2)


def _with_fifth_bits(lower: Tensor, fifth: Tensor) -> Tensor:
    """Codes, 16 more wherever a bit is set: weight j's is bit j of four bytes ``[..., 4]``."""
    bits = fifth[..., None] >> torch.arange(8, dtype=torch.uint8, device=fifth.device) & 1
    return lower | bits.flatten(-2) << 4


def decode_q5_0(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """``d * (q - 16)``: fp16 d, four bytes of upper bits, then the lower four as in q4_0.

    Args:
        weight: ``[..., R, C / 32 * 22]`` uint8.
        scale: not used.

    Returns:
        ``[..., R, C]`` fp32.
    """
    block = _blocks(weight, 22)
    codes = _with_fifth_bits(_halves(block[..., 6:]), block[..., 2:6])
    return (_half(block[..., :2]) * (codes.float() - 16)).flatten(-2)


def decode_q5_1(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """``d * q + m``: fp16 d and m, then q as in q5_0.

    Args:
        weight: ``[..., R, C / 32 * 24]`` uint8.
        scale: not used.

    Returns:
        ``[..., R, C]`` fp32.
    """
    block = _blocks(weight, 24)
    codes = _with_fifth_bits(_halves(block[..., 8:]), block[..., 4:8])
    return (_half(block[..., :2]) * codes.float() + _half(block[..., 2:4])).flatten(-2)


def _scaled(block: Tensor, codes: Tensor) -> Tensor:
    """``d * s * q - dmin * m``, with 6-bit s and m for each of the block's eight 32 weights.

    Args:
        block: ``[..., bytes]``: fp16 d and dmin, 12 bytes of s and m.
        codes: q, ``[..., 8, 32]``.

    Returns:
        ``[..., 8, 32]`` fp32.
    """
    first, second, third = block[..., 4:16].split(4, dim=-1)
    # The first four eighths have bytes of their own; their two upper bits serve the last four.
    factors = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=-1)[..., None]
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=-1)[..., None]
    scaled = _half(block[..., :2])[..., None] * factors.float() * codes.float()
    return scaled - _half(block[..., 2:4])[..., None] * minima.float()


def _eighths(codes: Tensor) -> Tensor:
    """128 bytes of nibbles as ``[..., 8, 32]``: 32 of them hold an eighth's, and the next's."""
    return _halves(codes.unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)


def decode_q4_k(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Scales and minima, see ``_scaled``, then 128 bytes of codes: 32 bytes hold the 32 weights of
    one eighth in their low nibbles and those of the next in their high ones.

    Args:
        weight: ``[..., R, C / 256 * 144]`` uint8.
        scale: not used.

    Returns:
        ``[..., R, C]`` fp32.
    """
    block = _blocks(weight, 144)
    return _scaled(block, _eighths(block[..., 16:])).flatten(-3)


def decode_q5_k(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """As q4_k, with 32 bytes of upper bits before the codes: eighth r's are the bits r.

    Args:
        weight: ``[..., R, C / 256 * 176]`` uint8.
        scale: not used.

    Returns:
        ``[..., R, C]`` fp32.
    """
    block = _blocks(weight, 176)
    eighth = torch.arange(8, dtype=torch.uint8, device=weight.device)[:, None]
    fifth = block[..., None, 16:48] >> eighth & 1
    return _scaled(block, _eighths(block[..., 48:]) | fifth << 4).flatten(-3)


def decode_q6_k(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """``d * s * (q - 32)``, with an int8 s for each of the block's sixteen 16 weights.

    128 bytes of lower nibbles, 64 of upper pairs of bits, 16 of s, fp16 d. Each half of the block
    has 64 and 32 of them: its four 32 weights take the low nibbles of the first 32 bytes, of the
    second, their high nibbles, and bits 0-1, 2-3, 4-5, 6-7 of the upper bytes.

    Args:
        weight: ``[..., R, C / 256 * 210]`` uint8.
        scale: not used.

    Returns:
        ``[..., R, C]`` fp32.
    """
    block = _blocks(weight, 210)
    lower = _halves(block[..., :128].unflatten(-1, (2, 64)))  # [..., 2, 128]
    upper = block[..., 128:192].unflatten(-1, (2, 32))
    pairs = torch.cat([upper >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)  # [..., 2, 128]
    codes = (lower | pairs << 4).flatten(-2).unflatten(-1, (16, 16))
    factors = _half(block[..., 208:]) * block[..., 192:208].view(torch.int8).float()
    return (factors[..., None] * (codes.float() - 32)).flatten(-3)


Q8_0 = WeightFormat(
    "q8_0", "GGUF Q8_0", decode_q8_0, torch.uint8, block=32, stored=34, integers=True
)
Q4_0 = WeightFormat(
    "q4_0", "GGUF Q4_0", decode_q4_0, torch.uint8, block=32, stored=18, integers=True
)
Q4_1 = WeightFormat(
    "q4_1", "GGUF Q4_1", decode_q4_1, torch.uint8, block=32, stored=20, integers=True
)
Q5_0 = WeightFormat(
    "q5_0", "GGUF Q5_0", decode_q5_0, torch.uint8, block=32, stored=22, integers=True
)
Q5_1 = WeightFormat(
    "q5_1", "GGUF Q5_1", decode_q5_1, torch.uint8, block=32, stored=24, integers=True
)
Q4_K = WeightFormat(
    "q4_k", "GGUF Q4_K", decode_q4_k, torch.uint8, block=256, stored=144, integers=True
)
Q5_K = WeightFormat(
    "q5_k", "GGUF Q5_K", decode_q5_k, torch.uint8, block=256, stored=176, integers=True
)
Q6_K = WeightFormat(
    "q6_k", "GGUF Q6_K", decode_q6_k, torch.uint8, block=256, stored=210, integers=True
)
FORMATS = (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K)

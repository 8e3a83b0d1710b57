"""Two 4-bit codes in a byte, the low nibble first, as MXFP4 and int4 keep neighbouring weights."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_nibbles(packed: Tensor) -> Tensor:
    """``[..., C / 2]`` bytes to ``[..., C]`` codes 0 to 15, both uint8."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """``[..., C]`` codes 0 to 15 to ``[..., C / 2]`` bytes, both uint8."""
    return codes[..., ::2] | codes[..., 1::2] << 4

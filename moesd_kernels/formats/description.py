"""What a weight format is: how a row of weights lies in memory, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Weights of a row that share one scale, in the formats that leave it open; or all of them do.
GROUPS = (32, 64, 128)
BLOCK = 128  # side of the square that shares a scale in `fp8_block`


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a matrix ``[..., R, C]`` of R rows and depth C is stored, and how it is read.

    Attributes:
        name: its public name.
        meaning: one line for people.
        decode: weight and scale to fp32 values ``[..., R, C]``, in fp32 arithmetic.
        dtype: of the weight tensor; None for that of the hidden states.
        block: weights along the depth that lie together: C is a multiple of it.
        stored: elements of the weight tensor that a block takes.
        scales: "none", "square" (one for ``BLOCK`` x ``BLOCK`` weights), "fixed" (one for every
            ``block`` weights of a row) or "group" (one for every G of a row, G of ``GROUPS``, or
            one for the row).
        scale_dtype: of the scale tensor, or None.
        integers: whether weights are integers times a scale, maybe plus a number, for every 32 of
            a row or every 16: hidden states may then be rounded to eight bits before a product.
    """

    name: str
    meaning: str
    decode: Callable[[Tensor, Tensor | None], Tensor]
    dtype: torch.dtype | None = None
    block: int = 1
    stored: int = 1
    scales: str = "none"
    scale_dtype: torch.dtype | None = None
    integers: bool = False

    def depth(self, weight: Tensor) -> int:
        """C of a weight tensor ``[..., R, C]`` as stored."""
        return weight.shape[-1] * self.block // self.stored

    def width(self, depth: int) -> int:
        """Elements of the weight tensor that a row of C weights takes."""
        return depth // self.block * self.stored

    def bits(self, group: int = GROUPS[0], plain_bits: int = 16) -> float:
        """Bits of memory per weight, scales included.

        Args:
            group: G, where the format leaves it open.
            plain_bits: of a weight in the format "plain".
        """
        if self.dtype is None:
            return plain_bits
        per_scale = {"none": 0, "square": BLOCK**2, "fixed": self.block, "group": group}[
            self.scales
        ]
        scale_bits = 8 * self.scale_dtype.itemsize / per_scale if self.scale_dtype else 0.0
        return 8 * self.dtype.itemsize * self.stored / self.block + scale_bits

    def scale_shapes(self, rows: int, depth: int) -> tuple[tuple[int, int], ...]:
        """The last two sizes that the scale of ``[..., R, C]`` may have; empty without a scale."""
        if self.scales == "square":
            return ((-(-rows // BLOCK), -(-depth // BLOCK)),)
        if self.scales == "fixed":
            return ((rows, depth // self.block),)
        if self.scales == "group":
            groups = [depth // group for group in GROUPS if depth % group == 0]
            return tuple((rows, count) for count in dict.fromkeys([*groups, 1]))
        return ()

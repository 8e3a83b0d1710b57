"""Weight formats of the Triton kernels: their numbers, and an expert layer's weights as stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS
from moesd_kernels.formats.description import BLOCK as SQUARE

# What the kernels are specialised on, by the names of `moesd_kernels.formats.WEIGHT_FORMATS`.
NUMBERS = {"plain": 0, "fp8_block": 1, "mxfp4": 2, "int8": 3, "int4": 4}
# From this compute capability on there is an instruction for E4M3.
NATIVE_FP8 = 89


def stored_bits(weight_format: str) -> int | None:
    """Bits of a stored weight without its scales; None for the width of the activations."""
    stored = WEIGHT_FORMATS[weight_format]
    if stored.dtype is None:
        return None
    return 8 * stored.dtype.itemsize * stored.stored // stored.block


@dataclass(frozen=True, slots=True)
class Matrices:
    """The weights of one product, of all experts, as a kernel takes them.

    Attributes:
        weight: ``[E, R, C]`` or, stored in fewer elements, [E, R, width of a row].
        scale: contiguous, or None where the format has none.
        bias: ``[E, R]`` contiguous, or None.
        depth: C.
        constexprs: FORMAT, and GROUP: weights of a row that share a scale.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None
    depth: int
    constexprs: dict[str, int]

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, scale and bias."""
        return self.weight, self.scale, self.bias


def matrices(
    weight: Tensor, scale: Tensor | None, bias: Tensor | None, weight_format: str, capability: int
) -> Matrices:
    """What a kernel is given for weights in a format.

    Args:
        weight, scale: as ``moesd_kernels.formats`` describes them; plain weights of any strides.
        bias: ``[E, R]`` or None.
        weight_format: one of ``moesd_kernels.formats.WEIGHT_FORMATS``.
        capability: 10 * major + minor of the device.

    Raises:
        NotImplementedError: another format.
    """
    if weight_format not in NUMBERS:
        raise NotImplementedError(
            f"the Triton kernels read weights as {', '.join(NUMBERS)}, got {weight_format}: "
            "GGUF's blocks are for a CPU"
        )
    depth, group = WEIGHT_FORMATS[weight_format].depth(weight), 1
    if scale is not None:
        scale = scale.contiguous()
        square = WEIGHT_FORMATS[weight_format].scales == "square"
        # Of a row's one scale it is all of the row; kernels count in powers of two.
        group = SQUARE if square else 1 << (depth // scale.shape[-1] - 1).bit_length()
    if weight.dtype == torch.float8_e4m3fn and capability < NATIVE_FP8:
        weight = weight.view(torch.uint8)
    bias = None if bias is None else bias.contiguous()
    constexprs = {"FORMAT": NUMBERS[weight_format], "GROUP": group}
    return Matrices(weight, scale, bias, depth, constexprs)

"""transformers' FP8 modules: E4M3 weights with a scale for 128 x 128 of them, or for all."""

from __future__ import annotations

import torch
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS


def is_block_scaled(weight: Tensor | None, scale: Tensor | None) -> bool:
    """Whether these are weights of the format "fp8_block", whatever dtype the scales have."""
    known = WEIGHT_FORMATS["fp8_block"]
    if weight is None or scale is None:
        return False
    rows, depth = weight.shape[-2:]
    return weight.dtype == known.dtype and scale.shape[-2:] in known.scale_shapes(rows, depth)


def read_scale(scale: Tensor) -> Tensor:
    """The scale in fp32: checkpoints also have bf16, and powers of two in a byte."""
    return scale if scale.dtype == torch.float32 else scale.float()


def spread_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """One scale for a whole matrix as one for each of its blocks."""
    shape = WEIGHT_FORMATS["fp8_block"].scale_shapes(weight.shape[0], weight.shape[1])[0]
    return read_scale(scale).reshape(1, 1).expand(shape).contiguous()

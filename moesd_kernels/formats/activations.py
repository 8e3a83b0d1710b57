"""Activations of eight bits, for products with weights that are stored as integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesd_kernels.transforms import in_torch_func

GROUP = 32  # adjacent activations of a row that share a scale
_MOST_DEPTH = 65536  # up to which sums of products of bytes fit into 32 bits
_LARGEST = 127
_SMALLEST = 1e-36  # of a group's magnitudes: the inverse of a smaller one is not finite in fp32


def activation_group(weight_format: str, scale: Tensor | None, depth: int) -> int:
    """Adjacent inputs of a linear layer that share a scale when they are rounded to eight bits.

    As many as its weights do where those are rows of int8 with one scale each: a sum of products is
    then one integer (LLM.int8, Dettmers et al. 2022, section 3.1: vector-wise quantisation).

    Args:
        weight_format: of the layer's matrix.
        scale: its scales, or None.
        depth: C of the layer.
    """
    rows = weight_format == "int8" and scale is not None and scale.shape[-1] == 1
    return depth if rows and depth <= _MOST_DEPTH else GROUP


def round_to_int8(x: Tensor, group: int = GROUP) -> Tensor:
    """The numbers that ``x`` becomes: the nearest of 255 in each group, ties to even.

    A group's scale is its largest magnitude over 127; a group that holds infinity or NaN has no
    finite number. Source: Q8_0 of ggml (``quantize_row_q8_0_ref``), with scales in fp32.

    Args:
        x: [..., C], floating, C a multiple of ``group``.
        group: adjacent numbers of a row that share a scale.

    Returns:
        [..., C] fp32.
    """
    groups = x.float().unflatten(-1, (-1, group))
    most = groups.abs().amax(dim=-1, keepdim=True)
    # Not 127 / most: torch multiplies by a reciprocal, which rounds twice.
    inverse = torch.full_like(most, _LARGEST).div(most).where(most >= _SMALLEST, 0)
    return (torch.round(groups * inverse) * (most / _LARGEST)).flatten(-2)


def round_straight_through(x: Tensor, group: int = GROUP) -> Tensor:
    """``round_to_int8(x, group)``, to the bit, with the gradient of ``x`` itself.

    That of rounding is zero almost everywhere, which would leave what lies before with none but the
    scale's. Source: Bengio et al. 2013, section 4 (the straight-through estimator).
    """
    if torch.is_grad_enabled() and (x.requires_grad or in_torch_func()):
        return _StraightThrough.apply(x, group)
    return round_to_int8(x, group)


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, group: int) -> Tensor:
        return round_to_int8(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].float()

"""Layers with quantised weights, and the plain ones on the numbers that those stand for."""

from __future__ import annotations

import torch
from support.oracle import Case, make_case
from torch import Tensor

from bench.workloads import stored
from moesd_kernels.formats import WEIGHT_FORMATS, activation_group, dequantize, round_to_int8

QUANTISED = [name for name in WEIGHT_FORMATS if name != "plain"]
INTEGERS = [name for name in QUANTISED if WEIGHT_FORMATS[name].integers]
# Formats of gate and up, and of down, in one layer: llama.cpp's mixtures, and some of ours.
MIXTURES = [
    ("q4_k", "q6_k"),
    ("q4_k", "q8_0"),
    ("q6_k", "q4_k"),
    ("q4_0", "q4_1"),
    ("q4_0", "q8_0"),
    ("q8_0", "plain"),
    ("plain", "q4_0"),
    ("int4", "int8"),
    ("fp8_block", "mxfp4"),
]


def stored_weight(
    name: str, *shape: int, seed: int = 0, group: int = 32
) -> tuple[Tensor, Tensor | None]:
    """Random weight and scale of a format for weights of a shape (..., R, C)."""
    generator = torch.Generator().manual_seed(seed)
    return stored.stored_weight(name, *shape, generator=generator, group=group)


def quantised_case(
    name: str, *sizes: int, group: int = 32, down: str | None = None, **options
) -> tuple[Case, Case]:
    """A layer with quantised weights, and the plain one on the numbers that they stand for.

    ``down`` is the down projection's format, where it has another. ``sizes`` and ``options`` are
    those of ``make_case``.
    """
    plain = make_case(*sizes, **options)
    tensors, numbers, more = list(plain.tensors), list(plain.tensors), dict(plain.options)
    more |= {"weight_format": name, "down_format": down}
    for place, kind in ((1, name), (2, down or name)):
        if kind == "plain":
            continue
        weight, scale = stored_weight(kind, *numbers[place].shape, seed=place, group=group)
        tensors[place], more[("gate_up_scale", "down_scale")[place - 1]] = weight, scale
        numbers[place] = dequantize(weight, scale, kind, plain.x.dtype)
    return Case(tuple(tensors), more), plain._replace(tensors=tuple(numbers))


def check_int8_product(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, name: str, bias=None
) -> None:
    """``out`` is the product of the rounded ``x``: up to fp32 sums, and a rounding to its dtype."""
    w = dequantize(weight, scale, name, torch.float32).double()
    rounded = round_to_int8(x, activation_group(name, scale, x.shape[-1])).double()
    expected, shift = rounded @ w.T, 0 if bias is None else bias.double()
    # A run's codes and its minimum are summed apart, and each may be thrice its largest weight.
    largest = w.abs().unflatten(-1, (-1, 32)).amax(-1).repeat_interleave(32, -1)
    sums = 2 * rounded.abs() @ largest.T + (expected + shift).abs()
    once = torch.finfo(x.dtype)
    budget = sums * 2**-22 + (expected + shift).abs() * once.eps / 2 + once.tiny
    error = (out.double() - (expected + shift)).abs()
    assert out.dtype == x.dtype and out.shape == expected.shape
    assert (error <= budget).all(), (name, (error / budget).max())

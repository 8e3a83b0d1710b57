"""Random weights in every weight format, of the size that a layer's weights have."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS, quantize

# Standard deviation of a block's random codes, scales of their own included.
_SPREAD = {
    **{"q8_0": 74.0, "q4_0": 4.6, "q4_1": 4.6, "q5_0": 9.2, "q5_1": 9.2},
    **{"q4_k": 256.0, "q5_k": 530.0, "q6_k": 1365.0},
}
# Where a block keeps fp16 numbers, and what they are of the scale: minima that centre the codes.
_HALVES = {
    **{"q4_1": ((0, 1.0), (2, -7.5)), "q5_1": ((0, 1.0), (2, -15.5))},
    **{"q4_k": ((0, 1.0), (2, 7.5)), "q5_k": ((0, 1.0), (2, 15.5)), "q6_k": ((208, 1.0),)},
}


def formats_of(name: str) -> tuple[str, str]:
    """The weight formats of an expert's first projection and of its second.

    Args:
        name: of both, or of each: ``q4_k``, ``q4_k+q6_k``.

    Raises:
        ValueError: one is no key of ``WEIGHT_FORMATS``.
    """
    first, _, second = name.partition("+")
    found = first, second or first
    if not WEIGHT_FORMATS.keys() >= set(found):
        raise ValueError(f"expected one or two of {', '.join(WEIGHT_FORMATS)}, got {name!r}")
    return found


def stored_weight(
    name: str, *shape: int, generator: torch.Generator, group: int = 32
) -> tuple[Tensor, Tensor | None]:
    """Weight and scale in the format ``name`` for weights (..., R, C) of about N(0, 1 / C).

    Args:
        name: a key of ``WEIGHT_FORMATS``; of "plain" the weights are in fp32.
        shape: (..., R, C); C is what the format can hold.
        generator: of the device the tensors are made on.
        group: weights per scale of int8 and int4.
    """
    known, device = WEIGHT_FORMATS[name], generator.device
    *leading, R, C = shape
    random: dict[str, Any] = {"generator": generator, "device": device}
    if name == "plain":
        return torch.randn(*shape, **random) * C**-0.5, None
    if name in ("int8", "int4"):
        return quantize(torch.randn(*shape, **random) * C**-0.5, name, group)
    if name == "fp8_block":
        sizes = known.scale_shapes(R, C)[0]
        scale = (torch.rand(*leading, *sizes, **random) + 0.5) * C**-0.5 / 64
        return (torch.randn(*shape, **random) * 64).to(torch.float8_e4m3fn), scale
    weight = torch.randint(256, (*leading, R, known.width(C)), dtype=torch.uint8, **random)
    if name == "mxfp4":
        sizes = known.scale_shapes(R, C)[0]
        middle = 125 - round(math.log2(C) / 2)
        spread = torch.randint(3, (*leading, *sizes), dtype=torch.uint8, **random)
        return weight, spread + middle
    blocks = weight.unflatten(-1, (-1, known.stored))
    d = (torch.rand(*blocks.shape[:-1], 1, **random) + 0.5) * C**-0.5 / _SPREAD[name]
    for at, factor in _HALVES.get(name, ((0, 1.0),)):
        blocks[..., at : at + 2] = (d * factor).half().view(torch.uint8)
    return weight, None

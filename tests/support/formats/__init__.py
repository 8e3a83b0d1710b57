"""Random weights in every weight format, of the size that a layer's weights have."""

from __future__ import annotations

import torch
from support.oracle import Case, make_case
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS, dequantize, quantize

QUANTISED = [name for name in WEIGHT_FORMATS if name != "plain"]
_GGML = {"q8_0": 64.0, "q4_0": 4.0, "q4_1": 4.0, "q4_k": 256.0, "q6_k": 1024.0}  # rough spread


def stored_weight(
    name: str, *shape: int, seed: int = 0, group: int = 32
) -> tuple[Tensor, Tensor | None]:
    """Weight and scale of a format for weights of a shape (..., R, C), about N(0, 1 / C)."""
    g = torch.Generator().manual_seed(seed)
    *leading, R, C = shape
    values = torch.randn(*shape, generator=g) / C**0.5
    known = WEIGHT_FORMATS[name]
    if name in ("int8", "int4"):
        return quantize(values, name, group)
    if name == "fp8_block":
        sizes = known.scale_shapes(R, C)[0]
        scale = (torch.rand(*leading, *sizes, generator=g) + 0.5) / C**0.5 / 64
        return (values * C**0.5 * 64).to(torch.float8_e4m3fn), scale
    weight = torch.randint(256, (*leading, R, known.width(C)), generator=g, dtype=torch.uint8)
    if name == "mxfp4":
        middle = 125 - round(torch.tensor(C**0.5).log2().item())
        sizes = known.scale_shapes(R, C)[0]
        spread = torch.randint(3, (*leading, *sizes), generator=g)
        return weight, (middle + spread).to(torch.uint8)
    blocks = weight.unflatten(-1, (-1, known.stored))
    d = (torch.rand(*blocks.shape[:-1], 1, generator=g) + 0.5) / C**0.5 / _GGML[name]
    places = {"q4_1": ((0, 1), (2, -7.5)), "q4_k": ((0, 1), (2, 7.5)), "q6_k": ((208, 1),)}
    for at, factor in places.get(name, ((0, 1),)):  # minima are such that they centre the codes
        blocks[..., at : at + 2] = (d * factor).half().view(torch.uint8)
    return weight, None


def quantised_case(name: str, *sizes: int, group: int = 32, **options) -> tuple[Case, Case]:
    """A layer with quantised weights, and the plain one on the numbers that they stand for.

    ``sizes`` and ``options`` are those of ``make_case``.
    """
    plain = make_case(*sizes, **options)
    dtype, tensors, more = plain.x.dtype, list(plain.tensors), dict(plain.options)
    stored, scales = list(tensors), dict(more, weight_format=name)
    for place, scale_name in ((1, "gate_up_scale"), (2, "down_scale")):
        weight, scale = stored_weight(name, *tensors[place].shape, seed=place, group=group)
        stored[place], scales[scale_name] = weight, scale
        tensors[place] = dequantize(weight, scale, name, dtype)
    return Case(tuple(stored), scales), plain._replace(tensors=tuple(tensors))

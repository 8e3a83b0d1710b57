"""Layers with quantised weights, and the plain ones on the numbers that those stand for."""

from __future__ import annotations

import torch
from support.oracle import Case, make_case
from torch import Tensor

from bench.workloads import stored
from moesd_kernels.formats import WEIGHT_FORMATS, dequantize

QUANTISED = [name for name in WEIGHT_FORMATS if name != "plain"]


def stored_weight(
    name: str, *shape: int, seed: int = 0, group: int = 32
) -> tuple[Tensor, Tensor | None]:
    """Random weight and scale of a format for weights of a shape (..., R, C)."""
    generator = torch.Generator().manual_seed(seed)
    return stored.stored_weight(name, *shape, generator=generator, group=group)


def quantised_case(name: str, *sizes: int, group: int = 32, **options) -> tuple[Case, Case]:
    """A layer with quantised weights, and the plain one on the numbers that they stand for.

    ``sizes`` and ``options`` are those of ``make_case``.
    """
    plain = make_case(*sizes, **options)
    tensors, numbers, more = list(plain.tensors), list(plain.tensors), dict(plain.options)
    more["weight_format"] = name
    for place, scale_name in ((1, "gate_up_scale"), (2, "down_scale")):
        weight, scale = stored_weight(name, *numbers[place].shape, seed=place, group=group)
        tensors[place], more[scale_name] = weight, scale
        numbers[place] = dequantize(weight, scale, name, plain.x.dtype)
    return Case(tuple(tensors), more), plain._replace(tensors=tuple(numbers))

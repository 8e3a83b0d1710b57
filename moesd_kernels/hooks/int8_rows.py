"""Packed linear layers as a processor likes them: rows of int8."""

from __future__ import annotations

from contextlib import suppress
from typing import TypeVar

from torch import nn

from moesd_kernels.formats import WEIGHT_FORMATS, QuantizedLinear, quantize

from .quantize import use_int8_activations

Model = TypeVar("Model", bound=nn.Module)

# Activations' rows from which on rows of int8 take less time than four-bit groups (Zen 4, 134 M
# weights: 6.0 and 6.9 ms for four rows, 5.9 and 4.7 for one), without AMX and with it.
_ROWS, _ROWS_WITH_TILES = 4, 8


def suit_processor(model: Model, rows: int, *, tiles: bool) -> Model:
    """Let packed linear layers take least time at ``rows`` rows of inputs; returns ``model``.

    Inputs are rounded to eight bits, but for those of rows of int8 where there are tiles, which
    take sixteen in less time.

    Args:
        model: in evaluation mode, on a CPU.
        rows: of inputs, at most.
        tiles: whether the processor has AMX.
    """
    if rows >= (_ROWS_WITH_TILES if tiles else _ROWS):
        with suppress(ValueError):
            store_as_int8_rows(model)
    with suppress(ValueError):
        use_int8_activations(model)
    for module in model.modules():
        if tiles and type(module) is QuantizedLinear and _has_rows(module):
            module.int8_activations = False
    return model


def store_as_int8_rows(model: Model) -> Model:
    """Let a model's packed linear layers be int8 with one scale for a row; returns ``model``.

    A sum over such a row is one of integers, where weights in groups have a sum and a scale for
    each group: from a few rows of activations on that takes less time, though four-bit weights
    are fewer bytes. Numbers change by a rounding to 8 bits of their row's largest.
    Layers are replaced one by one; experts, plain layers and rows of int8 stay. Say so before
    ``accelerate``, or a decoder, takes the model.

    Args:
        model: one that ``quantize`` or ``load_gguf`` made.

    Raises:
        ValueError: no linear layer is packed in groups.
    """
    done = 0
    for name, module in list(model.named_modules()):
        if type(module) is not QuantizedLinear or _has_rows(module):
            continue
        known = WEIGHT_FORMATS[module.weight_format]
        weight = known.decode(module.weight.detach(), module.weight_scale)
        stored = quantize(weight, "int8", module.in_features)
        bias = module.bias if module.bias is None else module.bias.detach()
        rows = QuantizedLinear(*stored, bias, WEIGHT_FORMATS["int8"])
        model.set_submodule(name, rows.train(module.training))
        done += 1
    if not done:
        raise ValueError(f"{type(model).__name__} has no linear layer that is packed in groups")
    return model


def _has_rows(linear: QuantizedLinear) -> bool:
    scale = linear.weight_scale
    return linear.weight_format == "int8" and scale is not None and scale.shape[-1] == 1

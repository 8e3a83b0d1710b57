"""Packed linear layers as a processor with tiles likes them: rows of int8."""

from __future__ import annotations

from contextlib import suppress
from typing import TypeVar

from torch import nn

from moesd_kernels.formats import WEIGHT_FORMATS, QuantizedLinear, quantize

Model = TypeVar("Model", bound=nn.Module)

_ROWS = 8  # of activations, from which on rows of int8 take less time than four-bit groups


def suit_tiles(model: Model, rows: int) -> Model:
    """Let packed linear layers take tiles least time at ``rows`` rows; returns ``model``.

    Rows of int8 do not round their activations to eight bits: tiles take sixteen in less time.
    """
    if rows >= _ROWS:
        with suppress(ValueError):
            store_as_int8_rows(model)
    for module in model.modules():
        if type(module) is QuantizedLinear and _has_rows(module):
            module.int8_activations = False
    return model


def store_as_int8_rows(model: Model) -> Model:
    """Let a model's packed linear layers be int8 with one scale for a row; returns ``model``.

    A CPU with AMX multiplies such rows as they lie, where weights in groups are put together from
    a product for each group: from about eight rows of activations on that takes less time, though
    four-bit weights are fewer bytes. Numbers change by a rounding to 8 bits of their row's largest.
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

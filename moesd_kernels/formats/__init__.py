"""Weight formats: how matrices of weights are stored, and what the stored numbers mean.

A result with quantised weights is, by definition, the result with the weights that ``dequantize``
gives: the public definition of the format in fp32 arithmetic, rounded once to the dtype of the
hidden states. Letters: R rows (outputs) and C depth (inputs) of a matrix, G weights per scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ggml
from .activations import activation_group, round_straight_through, round_to_int8
from .check import check_weight
from .description import GROUPS, WeightFormat
from .floating import FP8_BLOCK, MXFP4
from .integer import INT4, INT8, quantize
from .linear import KeepsScales, QuantizedLinear

__all__ = [
    "GROUPS",
    "WEIGHT_FORMATS",
    "KeepsScales",
    "QuantizedLinear",
    "WeightFormat",
    "activation_group",
    "check_weight",
    "dequantize",
    "quantize",
    "round_straight_through",
    "round_to_int8",
]


def _decode_plain(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight


PLAIN = WeightFormat(
    "plain", "one number per weight, in the dtype of the hidden states", _decode_plain
)
_OWN = (PLAIN, FP8_BLOCK, MXFP4, INT8, INT4)
WEIGHT_FORMATS = {known.name: known for known in (*_OWN, *ggml.FORMATS)}


def dequantize(weight: Tensor, scale: Tensor | None, name: str, dtype: torch.dtype) -> Tensor:
    """The matrix that stored weights stand for.

    Args:
        weight: [..., R, bytes or codes of a row], as the format stores it.
        scale: its scales, or None where the format has none.
        name: a key of ``WEIGHT_FORMATS``.
        dtype: of the result; values are computed in fp32 and rounded to it once.

    Returns:
        ``[..., R, C]``; of the format "plain" ``weight`` itself, in ``dtype``.
    """
    return WEIGHT_FORMATS[name].decode(weight, scale).to(dtype)

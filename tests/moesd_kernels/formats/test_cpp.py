"""The C++ operators' weight formats: Python's table, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from support.formats import stored_weight

from moesd_kernels.dense import ops
from moesd_kernels.formats import WEIGHT_FORMATS

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))


def test_names_are_those_of_the_table():
    assert torch.ops.moesd.weight_format_names() == list(WEIGHT_FORMATS)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("int8", {"weight_format": "int5"}, ValueError, "one of plain .*got int5"),
        ("int8", {"scale": None}, TypeError, "scale must be given in the format int8, got None"),
        ("q8_0", {"scale": torch.ones(1)}, TypeError, "scale must be None in the format q8_0"),
        ("int8", {"w": torch.zeros(5, 64)}, TypeError, "w must be Char .*int8, got Float"),
        ("q4_0", {"w": torch.zeros(5, 40).byte()}, ValueError, r"w must be \[5, 36\] in the"),
        ("q4_k", {}, ValueError, "rows of a multiple of 256 weights, got 64"),
        (
            *("int4", {"scale": torch.ones(5, 4).bfloat16()}, ValueError),
            r"one number for each 32, 64 or 128 of 64 weights of a row, got \[5, 4\]",
        ),
        ("int4", {"scale": torch.ones(5, 2)}, TypeError, "scale must be BFloat16 .*got Float"),
        (
            *("mxfp4", {"scale": torch.ones(2, 5).byte().T}, ValueError),
            "scale must be contiguous",
        ),
    ],
)
def test_errors(name, change, error, message):
    depth = WEIGHT_FORMATS[name].block * 2 if name != "q4_k" else 256
    w, scale = stored_weight(name, 5, max(64, depth))
    call = {"w": w, "scale": scale, "weight_format": name} | change
    with pytest.raises(error, match=message):
        ops.linear(torch.ones(3, 64), **call)

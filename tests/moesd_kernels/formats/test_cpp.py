"""The C++ operators' weight formats: Python's table, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from support.formats import stored_weight

from moesd_kernels import fused_experts
from moesd_kernels.dense import ops
from moesd_kernels.formats import WEIGHT_FORMATS, dequantize

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
            r"each 32, 64 or 128 of 64 weights of a row, or for all, got \[5, 4\]",
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [0.37, -3e38, 1e-45, 0.0])
def test_fp8_rows_of_two_squares(dtype, scale):
    """Up rows begin within a square of 128 rows, so those that are read together have two scales;
    they hold every code but NaN's.
    """
    depth, inter = 256, 96
    codes = torch.arange(2 * inter)[:, None] + torch.arange(depth)
    gate_up = torch.where(codes % 128 == 127, 0, codes).byte().view(torch.float8_e4m3fn)[None]
    scales = torch.tensor([[[1e-3, scale], [scale, 2.1]]])
    down, ids = torch.eye(depth, inter, dtype=dtype)[None], torch.zeros(3, 1, dtype=torch.long)
    x, weights = torch.eye(depth, dtype=dtype)[[0, 77, 200]], torch.ones(3, 1)
    down_8, one = down.to(torch.float8_e4m3fn), torch.ones(1, 2, 1)
    options = {"gate_up_scale": scales, "down_scale": one, "weight_format": "fp8_block"}
    out = fused_experts(x, gate_up, down_8, ids, weights, backend="cpu", **options)
    plain = dequantize(gate_up, scales, "fp8_block", dtype)
    expected = fused_experts(x, plain, down, ids, weights, backend="cpu")
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [torch.inf, -torch.inf, 0.5])
@pytest.mark.parametrize("tokens", [1, 17, 40])  # tiles decode for few panels and for many
def test_fp8_rows_that_end_within_a_run(dtype, scale, tokens):
    """What is read beyond a row's end has no part in its sums, whatever its scale makes of it."""
    codes = torch.full((20, 40), 0x38).byte().view(torch.float8_e4m3fn)
    out = ops.linear(
        torch.ones(tokens, 40, dtype=dtype),
        codes,
        scale=torch.tensor([[scale]]),
        weight_format="fp8_block",
    )
    assert torch.equal(out, torch.full((tokens, 20), 40 * scale, dtype=dtype))

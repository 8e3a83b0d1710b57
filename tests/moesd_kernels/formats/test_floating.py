"""FP8 and MXFP4: every code point and scale against the formats' definitions, written out here."""

from __future__ import annotations

import math

import pytest
import torch

from moesd_kernels.formats import dequantize

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def e4m3(code: int) -> float:
    """OCP 8-bit floating point: 4 bits of exponent with bias 7, 3 of fraction, no infinities."""
    sign, exponent, fraction = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    if exponent == 0:
        return sign * fraction * 2.0**-9
    return sign * (8 + fraction) * 2.0 ** (exponent - 10)


def e2m1(code: int) -> float:
    """2 bits of exponent with bias 1, 1 of fraction."""
    sign, exponent, fraction = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
    return sign * (fraction / 2 if exponent == 0 else (2 + fraction) * 2.0 ** (exponent - 2))


def e8m0(code: int) -> float:
    return math.nan if code == 255 else 2.0 ** (code - 127)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, NaN where NaN is and the sign of zero included."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(actual[kept], expected[kept])
    assert torch.equal(actual[kept].signbit(), expected[kept].signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_code_points(dtype):
    values = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float32)
    weight = ALL_BYTES.view(torch.float8_e4m3fn)[None]  # [1, 256]: two blocks of 128 columns
    scale = torch.tensor([[0.3, -1e4]])
    expected = values * scale.repeat_interleave(128, dim=1)
    same(dequantize(weight, scale, "fp8_block", dtype), expected.to(dtype))


def test_fp8_scales_belong_to_their_square():
    """Sizes that 128 does not divide: the last squares are cut off."""
    R, C = 130, 300
    weight = torch.randn(2, R, C).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, 3) + 0.5
    actual = dequantize(weight, scale, "fp8_block", torch.float32)
    for e, r, c in [(0, 0, 0), (0, 127, 127), (0, 128, 128), (1, 129, 255), (1, 129, 299)]:
        assert actual[e, r, c] == weight[e, r, c].float() * scale[e, r // 128, c // 128]
    assert actual.shape == (2, R, C)


@pytest.mark.parametrize("scale", [0.0, 3e38, 1e-45, math.inf, math.nan])
def test_fp8_extreme_scales(scale):
    """fp32 arithmetic: overflow gives infinity, zero times infinity NaN."""
    weight = torch.tensor([[0.0, 1.0, -448.0]]).to(torch.float8_e4m3fn)
    expected = torch.tensor([[0.0, 1.0, -448.0]]) * torch.tensor(scale)
    same(dequantize(weight, torch.tensor([[scale]]), "fp8_block", torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp4_code_points_under_every_scale(dtype):
    """256 rows of 32 weights: every pair of nibbles somewhere, each row under its own scale."""
    weight = (torch.arange(16) * 17 + torch.arange(256)[:, None]).to(torch.uint8)  # [256, 16]
    codes = torch.stack((weight & 15, weight >> 4), -1).view(256, 32)
    values = torch.tensor([e2m1(code) for code in range(16)], dtype=torch.float64)[codes.long()]
    scales = torch.tensor([e8m0(code) for code in range(256)], dtype=torch.float64)
    expected = (values * scales[:, None]).float().to(dtype)
    same(dequantize(weight, ALL_BYTES[:, None], "mxfp4", dtype), expected)


def test_mxfp4_groups_follow_the_row():
    weight = torch.full((1, 2, 32), 0x12, dtype=torch.uint8)  # codes 2, 1 = 1.0, 0.5
    scale = torch.tensor([[[127, 128], [126, 0]]], dtype=torch.uint8)
    actual = dequantize(weight, scale, "mxfp4", torch.float32)
    assert actual.shape == (1, 2, 64)
    assert actual[0, 0, 31:34].tolist() == [0.5, 2.0, 1.0]
    assert actual[0, 1, [0, 32]].tolist() == [0.5, 2.0**-127]


def test_mxfp4_is_what_transformers_dequantises():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 6, 3, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), generator=g, dtype=torch.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)  # [E, C, R]
    ours = dequantize(blocks.flatten(2), scales, "mxfp4", torch.bfloat16)
    same(ours, theirs.transpose(1, 2).contiguous())

"""MXFP4 and one or two tokens, which vectors multiply without decoding where tiles take others."""

from __future__ import annotations

import pytest
import torch
from support.formats import quantised_case, stored_weight

from moesd_kernels import fused_experts
from moesd_kernels.dense import ops
from moesd_kernels.formats import dequantize

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))

DEPTHS = (32, 96, 128, 160, 224, 256, 800, 2304)
# The powers of two that are taken end at 50 of activations and at 40 of scales.
NUMBERS = (0.0, -0.0, 2.0**-50, 2.0**-51, 1e-38, 1e-40, 1.9 * 2.0**50, 2.0**51, 3e38)
EXPONENTS = (0, 1, 20, 86, 87, 167, 168, 240, 254, 255)


def check(x, codes, exponents) -> None:
    """As plain weights of the same values have it, and a row as it is alone and beside others."""
    options = {"scale": exponents, "weight_format": "mxfp4"}
    whole = ops.linear(x, codes, **options)
    expected = ops.linear(x, dequantize(codes, exponents, "mxfp4", x.dtype))
    torch.testing.assert_close(whole, expected, rtol=0, atol=0, equal_nan=True)
    for rows in (slice(1), slice(1, 3), slice(len(x) - 1, len(x))):
        part = ops.linear(x[rows], codes, **options)
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("depth", DEPTHS)
def test_depths_and_rows(depth):
    for features in (1, 16, 37, 100):
        codes, exponents = stored_weight("mxfp4", features, depth)
        for tokens in (3, 17, 33, 34):
            check(torch.randn(tokens, depth).bfloat16(), codes, exponents)


@pytest.mark.parametrize("value", [*NUMBERS, torch.inf, -torch.inf, torch.nan])
def test_activations_at_the_ends_of_the_range(value):
    codes, exponents = stored_weight("mxfp4", 37, 256)
    for place in (0, 130, 255):
        x = torch.randn(5, 256).bfloat16()
        x[1, place] = value
        check(x, codes, exponents)
    check(torch.full((3, 256), value).bfloat16(), codes, exponents)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_scales_at_the_ends_of_the_range(exponent):
    for group in (0, 3, 4, 6):
        codes, exponents = stored_weight("mxfp4", 37, 224)
        exponents[20, group] = exponent
        check(torch.randn(3, 224).bfloat16(), codes, exponents)
        exponents[:] = exponent
        check(torch.randn(3, 224).bfloat16(), codes, exponents)


def test_numbers_and_scales_of_all_sizes():
    generator = torch.Generator().manual_seed(0)
    for spread in (10, 30, 60, 120):
        for _ in range(10):
            codes, exponents = stored_weight("mxfp4", 64, 288)
            steps = torch.randint(-spread, spread + 1, (64, 9), generator=generator)
            exponents = (127 + steps).clamp(0, 254).byte()
            sizes = torch.randint(-spread, spread + 1, (4, 288), generator=generator)
            x = torch.randn(4, 288, generator=generator) * torch.exp2(sizes.float())
            check(x.bfloat16(), codes, exponents)


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_experts_of_few_tokens(tokens):
    """Experts of one, two and more tokens in one call, and tokens alone."""
    stored, plain = quantised_case(
        "mxfp4", tokens, 2, 4, 288, 160, dtype=torch.bfloat16, bias=True, interleaved=True
    )
    whole = fused_experts(*stored.tensors, **stored.options, backend="cpu")
    assert torch.equal(whole, fused_experts(*plain.tensors, **plain.options, backend="cpu"))
    x, *weights, ids, pair_weights = stored.tensors
    for t in range(tokens):
        rows = slice(t, t + 1)
        alone = fused_experts(
            x[rows], *weights, ids[rows], pair_weights[rows], **stored.options, backend="cpu"
        )
        assert torch.equal(alone[0], whole[t])

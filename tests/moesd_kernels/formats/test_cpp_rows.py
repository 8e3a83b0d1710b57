"""int8 with one scale for a row, which tiles multiply by activations of sixteen bits."""

from __future__ import annotations

import pytest
import torch
from support.formats import quantised_case, stored_weight
from support.oracle import check_experts

from moesd_kernels import fused_experts
from moesd_kernels.dense import ops
from moesd_kernels.formats import dequantize

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = (0, 1, 5, 16, 17, 33, 130)
DEPTHS = (32, 96, 544, 576, 2304)


def product(x, weight, scale, bias=None):
    return ops.linear(x, weight, bias, scale=scale, weight_format="int8")


def row_weight(features: int, depth: int):
    return stored_weight("int8", features, depth, group=depth)


def check_product(out, x, weight, scale, bias=None) -> None:
    """Weights and the sum may be rounded to the dtype, activations to 2^-15 of the largest."""
    w, x64 = dequantize(weight, scale, "int8", torch.float32).double(), x.double()
    exact = x64 @ w.T + (0 if bias is None else bias.double())
    eps = torch.finfo(x.dtype).eps
    largest = x64.abs().amax(dim=1, keepdim=True)
    bound = (eps / 2 + 1e-6) * (x64.abs() @ w.abs().T) + eps * exact.abs()
    if x.dtype == torch.bfloat16:
        bound = bound + largest * w.abs().sum(dim=1) * 2**-15
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_product(depth, dtype):
    for features in (1, 37, 100):
        weight, scale = row_weight(features, depth)
        assert scale.shape == (features, 1)
        bias = torch.randn(features, dtype=dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, depth).to(dtype)
            out = product(x, weight, scale)
            check_product(out, x, weight, scale)
            check_product(product(x, weight, scale, bias), x, weight, scale, bias)
            each = [product(row, weight, scale) for row in x.split(1)]
            assert torch.equal(torch.cat([out[:0], *each]), out)


def test_what_sixteen_bits_can_say_exactly_is_exact():
    """Codes at their extremes, and activations of every exponent that is taken as it is."""
    weight = torch.tensor([[127, -127, -128, 1]], dtype=torch.int8).repeat(20, 160)
    scale = torch.full((20, 1), 0.5).bfloat16()
    x = torch.tensor([255.0, -129.0, 2.0, -2.0, 1.0, 0.0, 128.0, -255.0]).repeat(5, 80)
    x = (x * torch.tensor([1.0, 2.0**-100, -(2.0**100), 3.0, 0.0])[:, None]).bfloat16()
    exact = x.double() @ dequantize(weight, scale, "int8", torch.float32).double().T
    for tokens in (1, 5):
        out = product(x[:tokens], weight, scale)
        assert torch.equal(out, exact[:tokens].bfloat16())


def test_a_large_activation_among_small_ones():
    weight, scale = row_weight(37, 2304)
    x = torch.randn(6, 2304).bfloat16()
    x[1, 5], x[2, 2303], x[3] = 3e4, -1e30, 0
    check_product(product(x, weight, scale), x, weight, scale)


@pytest.mark.parametrize("number", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(number):
    weight, scale = row_weight(37, 576)
    x = torch.randn(18, 576).bfloat16()
    expected = product(x, weight, scale)
    x[17, 3] = number
    out = product(x, weight, scale)
    assert torch.equal(out[:17], expected[:17])
    assert not out[17].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "interleaved": True, "activation_limit": 7.0, "activation_alpha": 1.702},
        {"gated": False, "activation": "relu2", "bias": True},
    ],
    ids=["plain", "gpt-oss", "not gated"],
)
@pytest.mark.parametrize("sizes", [(7, 2, 3, 256, 256), (150, 2, 3, 288, 288), (40, 1, 1, 96, 96)])
def test_experts(sizes, options, dtype):
    stored, plain = quantised_case("int8", *sizes, group=sizes[-1], dtype=dtype, **options)
    whole = fused_experts(*stored.tensors, **stored.options, backend="cpu")
    check_experts(whole, plain, "int8")
    x, *weights, ids, pair_weights = stored.tensors
    for t in range(0, len(x), 13):
        rows = slice(t, t + 1)
        alone = fused_experts(
            x[rows], *weights, ids[rows], pair_weights[rows], **stored.options, backend="cpu"
        )
        assert torch.equal(alone[0], whole[t])


@pytest.mark.parametrize("down", ["q8_0", "plain", "int4"])
def test_another_format_below(down):
    sizes, options = (20, 2, 3, 256, 256), {"group": 256, "dtype": torch.bfloat16}
    stored, plain = quantised_case("int8", *sizes, down=down, **options)
    out = fused_experts(*stored.tensors, **stored.options, backend="cpu")
    check_experts(out, plain, "int8")

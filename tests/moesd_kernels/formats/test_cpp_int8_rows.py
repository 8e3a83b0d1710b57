"""Rows of int8 with one scale each, and of activations of eight bits with one scale each, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.formats import check_int8_product, stored_weight
from torch import Tensor

from moesd_kernels.dense import ops
from moesd_kernels.formats import activation_group

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = (0, 1, 2, 3, 5, 6, 7, 11, 12, 13, 25, 130)
DEPTHS = (32, 64, 96, 576, 800, 2304)
FEATURES = (1, 3, 37, 100)


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.linear(x, weight, bias, scale=scale, weight_format="int8", int8_activations=True)


def row_weight(features: int, depth: int) -> tuple[Tensor, Tensor]:
    weight, scale = stored_weight("int8", features, depth, group=depth)
    assert scale is not None and scale.shape == (features, 1)
    return weight, scale


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_definition(depth: int, dtype: torch.dtype) -> None:
    for features in FEATURES:
        weight, scale = row_weight(features, depth)
        bias = numbers(features, dtype=dtype, seed=1)
        for tokens in TOKENS:
            x = numbers(tokens, depth, dtype=dtype, seed=tokens)
            check_int8_product(product(x, weight, scale), x, weight, scale, "int8")
            out = product(x, weight, scale, bias)
            check_int8_product(out, x, weight, scale, "int8", bias)


def test_a_scale_is_that_of_a_row_only_where_sums_fit() -> None:
    """Up to 65536 products of the largest codes; beyond, and in groups, it is that of 32."""
    scale = torch.ones(2, 1, dtype=torch.bfloat16)
    assert activation_group("int8", scale, 65536) == 65536
    assert activation_group("int8", scale, 65568) == 32
    assert activation_group("int8", torch.ones(2, 2), 64) == 32
    assert activation_group("int4", scale, 64) == activation_group("q8_0", None, 64) == 32
    for depth in (65536, 65568):
        for code in (127, -127, -128):
            weight = torch.full((2, depth), code, dtype=torch.int8)
            for x in (torch.ones(3, depth), -torch.ones(3, depth)):
                out = product(x, weight, scale)
                torch.testing.assert_close(out, x[:, :2] * code * depth, rtol=1e-6, atol=0)


def test_sums_of_integers_are_exact() -> None:
    """One activation of 127 in a row, at each place, and codes of every value."""
    weight = (torch.arange(37 * 96) % 256 - 128).to(torch.int8).view(37, 96)
    scale = torch.full((37, 1), 0.5).bfloat16()
    out = product(torch.eye(96) * 127, weight, scale)
    assert torch.equal(out, weight.T.float() * 127 * 0.5)


def test_one_large_activation_makes_the_others_steps_larger() -> None:
    weight, scale = torch.ones(1, 64, dtype=torch.int8), torch.ones(1, 1).bfloat16()
    x = torch.full((1, 64), 0.4)
    torch.testing.assert_close(product(x, weight, scale), torch.tensor([[25.6]]), rtol=1e-5, atol=0)
    x[0, 63] = 127
    assert product(x, weight, scale).item() == 127


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_alone(value: float) -> None:
    weight, scale = row_weight(37, 256)
    for tokens in (3, 17):
        x = numbers(tokens, 256)
        before = product(x, weight, scale)
        x[1, 77] = value
        out = product(x, weight, scale)
        assert not out[1].isfinite().any()
        assert torch.equal(out[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("tiny", [1e-37, 1e-45, 0.0])
def test_rows_of_next_to_nothing_are_nothing(tiny: float) -> None:
    weight, scale = row_weight(37, 256)
    assert not product(torch.full((5, 256), tiny), weight, scale).any()


def test_activations_may_lie_apart_and_weights_begin_anywhere() -> None:
    weight, scale = row_weight(37, 800)
    for x in (numbers(9, 1600)[:, ::2], numbers(800, 9).T, numbers(1, 800).expand(9, 800)):
        expected = product(x.contiguous(), weight, scale)
        assert torch.equal(product(x, weight, scale), expected)
        for offset in (1, 3):
            moved = torch.cat([weight.flatten()[:offset], weight.flatten()])[offset:]
            steps = torch.cat([scale.flatten()[:offset], scale.flatten()])[offset:]
            assert torch.equal(product(x, moved.view(37, 800), steps.view(37, 1)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_has_the_same_bits_in_any_company(
    dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Of other rows of activations, of other rows of weights, and on any number of threads."""
    weight, scale = row_weight(1000, 800)
    x, bias = numbers(40, 800, dtype=dtype), numbers(1000, dtype=dtype)
    threads(1)
    expected = product(x, weight, scale, bias)
    for count in (1, 2):
        threads(count)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(count))
        for tokens in (1, 2, 5, 6, 7, 12, 13, 40):
            rows = order[:tokens]
            assert torch.equal(product(x[rows], weight, scale, bias), expected[rows])
        for some in (slice(1), slice(4), slice(3, 40), slice(999, 1000), slice(15, 900)):
            assert torch.equal(product(x, weight[some], scale[some], bias[some]), expected[:, some])

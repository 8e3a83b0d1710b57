"""Activations of eight bits: groups made by hand, and by how little a number moves."""

from __future__ import annotations

import math

import pytest
import torch

from moesd_kernels.formats import round_straight_through, round_to_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def group(*numbers: float) -> torch.Tensor:
    """The numbers, and zeros up to 32."""
    return torch.tensor([*numbers, *[0.0] * (32 - len(numbers))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_group_can_say_exactly_it_says(dtype):
    """127 at the edge: the scale is a power of two, and codes are the numbers over it."""
    x = torch.stack([group(127, -127, *range(-15, 15)), group(*range(96, 128)) * -1]) * 2**-5
    assert torch.equal(round_to_int8(x.to(dtype)), x)


def test_ties_go_to_the_even_code():
    x = group(127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 125.5, 0.51, -1.49)
    assert torch.equal(round_to_int8(x), group(127, 0, 2, 2, 0, -2, -2, 126, 126, 1, -1))


def test_each_group_has_a_scale_of_its_own():
    x = torch.cat([group(127, 0.4), group(1, 0.4), group(0), group(12.7, 0.4)])
    rounded = round_to_int8(x)
    assert rounded[:2].tolist() == [127, 0]
    assert torch.equal(rounded[32:64], round_to_int8(x[32:64]))
    assert rounded[33] == 51 * (torch.tensor(1.0) / 127)  # 50.8 steps
    assert not rounded[64:96].any()
    assert rounded[97] == 4 * (torch.tensor(12.7) / 127)


@pytest.mark.parametrize(("most", "kept"), [(0.99e-36, 0), (1.01e-36, 1), (1e-45, 0), (3.4e38, 1)])
def test_the_edges_of_fp32(most, kept):
    """A group below 1e-36 is zero; the largest numbers have a scale as well."""
    rounded = round_to_int8(group(-most, most / 2))
    assert rounded.isfinite().all()
    expected = torch.tensor(most) * -kept
    torch.testing.assert_close(rounded[0], expected, rtol=1e-6, atol=0)
    assert not rounded[2:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_that_is_not_finite_has_no_finite_number(dtype, value):
    x = torch.ones(2, 96, dtype=dtype)
    x[1, 40] = value
    finite = round_to_int8(x).isfinite()
    assert not finite[1, 32:64].any()
    assert finite[0].all() and finite[1, :32].all() and finite[1, 64:].all()


@pytest.mark.parametrize("shape", [(32,), (0, 64), (2, 3, 64), (1, 1, 1, 32), (5, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_and_dtype(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded = round_to_int8(x)
    assert rounded.shape == shape and rounded.dtype == torch.float32
    if x.numel():
        assert torch.equal(
            rounded.view(-1, shape[-1])[-1], round_to_int8(x.view(-1, shape[-1])[-1])
        )


def test_a_depth_without_whole_groups_is_refused():
    with pytest.raises(RuntimeError):
        round_to_int8(torch.ones(2, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 300.0, 1e36])
def test_no_number_moves_by_more_than_half_a_step(dtype, scale):
    """And there are at most 255 numbers in a group, whose largest stays what it is."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(500, 64, generator=g).clamp(-4, 4).exp() * scale).to(dtype).view(-1, 32)
    x = x[(x.float().abs().amax(-1) >= 1e-36) & x.isfinite().all(-1)]
    rounded, exact = round_to_int8(x).double(), x.double()
    step = exact.abs().amax(-1, keepdim=True) / 127
    assert ((rounded - exact).abs() <= step * (0.5 + 1e-4)).all()
    codes = rounded / step
    assert ((codes - codes.round()).abs() < 1e-4).all()
    assert ((codes.abs().amax(-1) - 127).abs() < 1e-4).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_gradient_passes_straight_through(dtype):
    """And the numbers are the same to the bit, zeros with a sign and infinity among them."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 1], x[1, 2], x[2] = -1e-4, math.inf, 0
    asked = x.clone().requires_grad_()
    rounded, expected = round_straight_through(asked), round_to_int8(x)
    assert torch.equal(rounded.detach().view(torch.int32), expected.view(torch.int32))
    given = torch.arange(192.0).view(3, 64)
    rounded.backward(given)
    assert asked.grad.dtype == dtype and torch.equal(asked.grad, given.to(dtype))
    with torch.no_grad():
        assert not round_straight_through(asked).requires_grad


def test_a_gradient_passes_straight_through_functions_of_functions():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    total = lambda row: round_straight_through(row).sum()
    assert torch.equal(torch.func.vmap(torch.func.grad(total))(x), torch.ones(3, 64))
    ones = torch.func.grad(lambda rows: torch.func.vmap(total)(rows).sum())(x)
    assert torch.equal(ones, torch.ones(3, 64))
    rounded, moved = torch.func.jvp(round_straight_through, (x,), (2 * x,))
    assert torch.equal(rounded, round_to_int8(x)) and torch.equal(moved, 2 * x)

"""Norms have the bits of the C++ operators wherever the sum of squares does."""

import pytest
import torch
from support.oracle import assert_as_accurate

from moesd_kernels.dense import ops
from moesd_kernels.dense.triton import norm_kernel
from moesd_kernels.dense.triton.norm_kernel import add_rms_norm, rms_norm

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
# One column; a rest; whole blocks; leading dimensions; a row in several blocks, with a rest.
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 40), (2, 3, 64), (2, 300)], ids=str)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows wider than this are read in blocks."""
    monkeypatch.setattr(norm_kernel, "MAX_BLOCK", 128)


def whole_numbers(*shape, dtype):
    """Their squares have the same sum in every order."""
    return torch.randint(-3, 4, shape).to(dtype)


@DTYPES
@SHAPES
def test_rounds_as_the_operator(shape, dtype):
    x, w = whole_numbers(*shape, dtype=dtype), torch.randn(shape[-1]).to(dtype)
    assert torch.equal(rms_norm(x, w, 1e-6), ops.rms_norm(x, w, 1e-6))
    for offset, cast_first in ((1.0, False), (1.0, True), (0.0, False)):
        expected = ops.rms_norm(x, w, 1e-5, offset=offset, cast_first=cast_first)
        assert torch.equal(rms_norm(x, w, 1e-5, offset, cast_first), expected)


@DTYPES
@SHAPES
def test_addition_rounds_as_the_operator(shape, dtype):
    delta, w = whole_numbers(*shape, dtype=dtype), torch.randn(shape[-1]).to(dtype)
    x = whole_numbers(*shape, dtype=dtype)
    for actual, expected in zip(
        add_rms_norm(x, delta, w, 1e-6), ops.add_rms_norm(x, delta, w, 1e-6), strict=True
    ):
        assert torch.equal(actual, expected)
    x = torch.randn(shape).to(dtype)
    total, normed = add_rms_norm(x, delta, w, 1e-6)
    assert torch.equal(total, x + delta) and torch.equal(normed, rms_norm(total, w, 1e-6))


@DTYPES
@SHAPES
def test_is_as_accurate_as_eager(shape, dtype):
    x, w = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1]).to(dtype)

    def eager(wide):
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w.to(wide.dtype) * normed if wide.dtype == torch.float64 else w * normed.to(dtype)

    assert_as_accurate(rms_norm(x, w, 1e-6), eager(x.float()), eager(x.double()), name="rms_norm")


def test_a_row_depends_on_itself_alone_wherever_it_lies():
    x, delta, w = torch.randn(5, 3, 200), torch.randn(5, 200), torch.randn(200)
    strided = x[:, 1]
    total, normed = add_rms_norm(strided, delta, w, 1e-6)
    for t in range(5):
        alone = add_rms_norm(x[t : t + 1, 1].clone(), delta[t : t + 1], w, 1e-6)
        assert torch.equal(alone[0][0], total[t]) and torch.equal(alone[1][0], normed[t])
    assert torch.equal(rms_norm(strided.flip(0), w, 1e-6), rms_norm(strided, w, 1e-6).flip(0))
    columns = x[0, :, :3].T
    assert torch.equal(rms_norm(columns, w[:3], 1e-6), rms_norm(columns.contiguous(), w[:3], 1e-6))


def test_empty_and_errors():
    x, w = torch.zeros(0, 8), torch.ones(8)
    assert rms_norm(x, w, 1e-6).shape == add_rms_norm(x, x, w, 1e-6)[0].shape == (0, 8)
    with pytest.raises(ValueError, match=r"w must be \[8\], got \[5\]"):
        rms_norm(x, torch.ones(5), 1e-6)
    with pytest.raises(
        TypeError, match=r"x must be float32, bfloat16 or float16, got torch.float64"
    ):
        rms_norm(x.double(), w.double(), 1e-6)
    with pytest.raises(ValueError, match=r"delta must be \[0, 8\], got \[1, 8\]"):
        add_rms_norm(x, torch.zeros(1, 8), w, 1e-6)
    with pytest.raises(TypeError, match=r"delta must be torch.float32, got torch.float16"):
        add_rms_norm(x, x.half(), w, 1e-6)

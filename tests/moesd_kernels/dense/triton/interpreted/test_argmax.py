"""The argmax is the C++ operator's: lowest place among equals, NaN largest."""

import pytest
import torch

from moesd_kernels.dense import ops
from moesd_kernels.dense.triton import argmax_kernel
from moesd_kernels.dense.triton.argmax_kernel import argmax

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# One column; within a part; a part; parts with a rest.
WIDTHS = pytest.mark.parametrize("V", [1, 7, 64, 150])
BLOCK = argmax_kernel.BLOCK


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(argmax_kernel, "BLOCK", 64)


def tied(*shape, dtype):
    return torch.randn(shape).mul(2).round().to(dtype)


def assert_as_the_operator(values):
    for actual, expected in zip(argmax(values), ops.argmax(values), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@DTYPES
@WIDTHS
def test_equals_the_operator(V, dtype):
    values = tied(3, 3, V, dtype=dtype)
    values[0, 1, V // 2] = float("nan")
    values[0, 2, [0, V - 1]] = -torch.tensor([float("nan")] * 2).to(dtype)
    values[1, 0] = float("-inf")
    values[1, 1, V - 1] = float("inf")
    values[1, 2, : V - 1] = float("-inf")  # all but one token banned
    values[2, 0], values[2, 0, V // 2 :] = -0.0, 0.0
    values[2, 1] = -values[2, 1].abs() - 1
    assert_as_the_operator(values)


def test_parts_of_the_real_size(monkeypatch):
    monkeypatch.setattr(argmax_kernel, "BLOCK", BLOCK)
    values = tied(2, 2 * BLOCK + 9, dtype=torch.float32)
    values[0, -1] = 100
    values[1, [2 * BLOCK - 1, 2 * BLOCK]] = 100
    assert_as_the_operator(values)
    assert argmax(values)[0].tolist() == [2 * BLOCK + 8, 2 * BLOCK - 1]


def test_more_parts_than_a_warp_has_threads():
    values = tied(1, 35 * 64 - 5, dtype=torch.float32)
    values[0, [34 * 64, 2200]] = 100
    assert_as_the_operator(values)


def test_rows_wherever_they_lie():
    values = tied(2, 3, 150, dtype=torch.float32)
    for view in (values[:, 1], values[1:2, 1], values[..., :70], values[0].T[:4], values[0, 0]):
        assert_as_the_operator(view)


def test_empty_and_errors():
    ids, undefined = argmax(torch.zeros(0, 5))
    assert ids.shape == undefined.shape == (0,)
    with pytest.raises(ValueError, match=r"with V > 0, got \[2, 0\]"):
        argmax(torch.zeros(2, 0))
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        argmax(torch.zeros(2, 3, dtype=torch.float64))

"""The argmax op is torch's: lowest place among equals, NaN largest."""

from __future__ import annotations

import pytest
import torch

from moesd_kernels.dense import ops

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
WIDTHS = pytest.mark.parametrize("V", [1, 7, 16, 100, 512, 513, 700, 4096])


def tied(V, dtype):
    generator = torch.Generator().manual_seed(V)
    return torch.randn(6, 3, V, generator=generator).mul(2).round().to(dtype)


@DTYPES
@WIDTHS
def test_equals_torch_with_ties(V, dtype):
    values = tied(V, dtype)
    ids, undefined = ops.argmax(values)
    assert torch.equal(ids, values.argmax(-1)) and not undefined.any()
    strided = values[:, ::2, : max(V // 2, 1)]
    assert torch.equal(ops.argmax(strided)[0], strided.argmax(-1))


@DTYPES
@WIDTHS
def test_rows_without_a_largest_value(V, dtype):
    values = tied(V, dtype)
    values[1, 1, V // 2] = float("nan")
    values[2, 2] = float("-inf")
    values[3, 0, V - 1] = float("inf")
    values[4, 0, : V - 1] = float("-inf")  # all but one token banned
    ids, undefined = ops.argmax(values)
    assert torch.equal(ids, values.argmax(-1))
    expected = torch.zeros(6, 3, dtype=torch.bool)
    expected[1, 1] = expected[2, 2] = True
    assert torch.equal(undefined, expected)


def test_empty_and_errors():
    ids, undefined = ops.argmax(torch.zeros(0, 5))
    assert ids.shape == undefined.shape == (0,)
    with pytest.raises(ValueError, match=r"with V > 0, got \[2, 0\]"):
        ops.argmax(torch.zeros(2, 0))
    with pytest.raises(TypeError, match="got Double"):
        ops.argmax(torch.zeros(2, 3, dtype=torch.float64))

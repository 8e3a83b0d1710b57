"""The blocked argmax is torch's, ties and NaN included."""

from __future__ import annotations

import pytest
import torch

from decoder.sampling.argmax import first_argmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 64, 100, 256, 700, 4096])  # both paths, and widths of neither
def test_equals_torch_with_ties_and_nan(V, dtype):
    generator = torch.Generator().manual_seed(V)
    values = torch.randn(5, 3, V, generator=generator).mul(2).round().to(dtype)  # many ties
    assert torch.equal(first_argmax(values), values.argmax(-1))
    values[1, 1, V // 2] = float("nan")
    values[2, 2] = float("-inf")
    values[3, 0] = 0.0
    assert torch.equal(first_argmax(values), values.argmax(-1))
    assert torch.equal(first_argmax(values[:, 0]), values[:, 0].argmax(-1))
    assert torch.equal(first_argmax(values[:, ::2]), values[:, ::2].argmax(-1))

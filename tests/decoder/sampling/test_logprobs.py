"""The most probable tokens: of equal ones the lowest, whatever else is asked for."""

from __future__ import annotations

import pytest
import torch

from decoder.sampling.logprobs import most_probable


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_of_equal_ones_the_lowest_come_first(dtype: torch.dtype, steps: int) -> None:
    """As a stable sort has them, for any count; bf16 logits are often equal."""
    logits = torch.randn(3, 4, 300, generator=torch.Generator().manual_seed(steps), dtype=dtype)
    logits = (logits * steps).round() / steps
    logits[0, 0, :5] = torch.tensor([0.0, -0.0, 0.0, -torch.inf, torch.inf])
    logits[0, 1] = 1.0
    expected = logits.sort(dim=-1, descending=True, stable=True).indices
    for count in (0, 1, 2, 20, 299, 300):
        assert torch.equal(most_probable(logits, count), expected[..., :count])


def test_the_most_probable_is_the_argmax() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert most_probable(logits, 1)[:, 0].tolist() == [1, 0]

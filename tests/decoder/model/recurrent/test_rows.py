"""Gates of models' own code: a token's bits do not depend on how many tokens there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from decoder.model.recurrent.rows import RowsApart, rows_apart

GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softplus": functional.softplus,
    "silu": functional.silu,
    "SiLU": torch.nn.SiLU(),
    "sigmoid": torch.sigmoid,
    "Tensor.sigmoid": torch.Tensor.sigmoid,
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("width", [1, 12, 30, 48, 64, 100])
def test_rows_are_the_same_alone(name: str, width: int) -> None:
    x = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(width))
    gate = GATES[name]
    with RowsApart():
        together, transposed = gate(x), gate(x.mT).mT
        alone = torch.stack([gate(row) for row in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(together, alone) and torch.equal(transposed, alone)
    torch.testing.assert_close(together, gate(x))


def test_what_need_not_be_copied_is_not() -> None:
    whole, strided = torch.zeros(2, 64), torch.zeros(3, 4, 12).transpose(0, 1)
    assert rows_apart(whole) is whole and rows_apart(strided) is strided
    assert rows_apart(torch.zeros(())).ndim == 0

"""The head's loss is the cross entropy against the target's distribution, and so its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.upcycle.eagle import lessons, loss
from training.upcycle.eagle.lessons import wanted
from training.upcycle.eagle.loss import DraftLoss

N, H, V = 13, 8, 29


def test_it_is_cross_entropy_and_so_is_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 5)
    monkeypatch.setattr(lessons, "CHUNK", 4)
    torch.manual_seed(0)
    hidden = torch.randn(N, H, requires_grad=True)
    last, rows = torch.randn(N, H), torch.randn(V, H)
    logits = last @ rows.T
    expected = F.cross_entropy(hidden @ rows.T, logits.softmax(-1), reduction="sum")
    (by_autograd,) = torch.autograd.grad(2 * expected, hidden)
    mean, choice = wanted(last, rows)
    assert torch.equal(choice, logits.argmax(-1))
    found = DraftLoss.apply(hidden, rows, mean)
    (got,) = torch.autograd.grad(2 * found, hidden)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(got, by_autograd)

"""Losses are cross entropies at the K asked for, loads count every token's experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.tiny import VOCAB, tiny_model

from training.upcycle.card.evaluate import (
    WINDOW,
    counting,
    difference,
    experts_per_token,
    routers,
    score,
    shares,
    total_variation,
    window_losses,
    windows,
)

ROWS, LENGTH = 3, 24


@pytest.fixture(scope="module")
def moe() -> Any:
    return tiny_model("mixtral", num_experts_per_tok=2)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def test_windows_are_spread_over_all_documents_and_overlap_by_the_label() -> None:
    documents = [torch.full((WINDOW - 1,), i) for i in range(9)] + [[99] * 5]
    found = windows(documents, separator=50, count=3)
    assert found.shape == (3, WINDOW + 1)
    assert found[:, 0].tolist() == [0, 4, 8]
    assert found[:, -2:].tolist() == [[50, 1], [50, 5], [50, 99]]
    assert len(windows(documents, separator=50, count=100)) == 9
    with pytest.raises(ValueError, match=f"more than {2 * WINDOW} tokens of text, got 2 of 513"):
        windows([[1] * WINDOW], separator=0, count=2)
    with pytest.raises(ValueError, match=r"expected two windows at least.* got 1 of"):
        windows(documents, separator=50, count=1)


def test_losses_are_the_labels_cross_entropies(moe: Any, rows: torch.Tensor) -> None:
    expected = []
    for row in rows:
        logits = moe(input_ids=row[None, :-1], use_cache=False).logits[0]
        expected.append(F.cross_entropy(logits, row[1:]).item())
    assert window_losses(moe, rows) == pytest.approx(expected, rel=1e-5)


def test_fewer_experts_are_a_model_with_fewer_experts(moe: Any, rows: torch.Tensor) -> None:
    other = tiny_model("mixtral", num_experts_per_tok=1)  # the same weights
    before = window_losses(moe, rows)
    with experts_per_token(moe, 1):
        assert window_losses(moe, rows) == window_losses(other, rows) != before
    assert window_losses(moe, rows) == before


def test_load_counts_every_choice_and_stops(moe: Any, rows: torch.Tensor) -> None:
    with counting(moe) as counts:
        window_losses(moe, rows)
    assert counts.shape == (2, 8)
    assert counts.sum(1).tolist() == [2 * ROWS * LENGTH] * 2
    before = counts.clone()
    window_losses(moe, rows)
    assert torch.equal(counts, before)


def test_load_is_the_routers_choice(moe: Any, rows: torch.Tensor) -> None:
    chosen: list[torch.Tensor] = []
    last = routers(moe)[-1]
    handle = last.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    with counting(moe) as counts:
        window_losses(moe, rows)
    handle.remove()
    assert counts[-1].tolist() == torch.bincount(chosen[0].flatten(), minlength=8).tolist()


def test_a_score_has_both_halves_in_order(moe: Any, rows: torch.Tensor) -> None:
    found = score(moe, rows, top_k=2)
    plain = window_losses(moe, rows)
    assert found["losses"] == pytest.approx([plain[0], plain[2], plain[1]], rel=1e-5)
    per_layer = torch.tensor(found["load"]).sum(-1)
    assert per_layer.tolist() == [[2 * 2 * LENGTH] * 2, [2 * LENGTH] * 2]
    assert score(tiny_model("llama"), rows).keys() == {"losses"}


def test_differences_are_paired() -> None:
    found = difference([1.0, 5.0, 9.0], [0.0, 4.0, 7.0])
    assert found.mean == pytest.approx(4 / 3)
    assert found.error == pytest.approx((1 / 3) ** 0.5 / 3**0.5)


@pytest.mark.parametrize(
    ("counts", "others", "distance"),
    [
        ([2, 2], [5, 5], 0.0),  # of shares, not counts
        ([4, 0], [0, 1], 1.0),
        ([3, 1], [1, 1], 0.25),
    ],
)
def test_total_variation(counts: list[int], others: list[int], distance: float) -> None:
    found = total_variation(torch.tensor([counts]), torch.tensor([others]))
    assert found.tolist() == pytest.approx([distance])


def test_shares_are_multiples_of_the_fair_one() -> None:
    assert shares(torch.tensor([[6, 2, 0, 0]])).tolist() == [[3.0, 1.0, 0.0, 0.0]]

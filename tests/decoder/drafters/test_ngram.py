"""Prompt lookup against a brute-force search, and the override of a model drafter."""

from __future__ import annotations

import pytest
import torch

from decoder.drafters.base import StatelessDrafter
from decoder.drafters.ngram import HybridDrafter, NgramDrafter, longest_recent_match
from decoder.round import Draft, StepState


def make_state(texts: list[list[int]], rows: list[int] | None = None) -> StepState:
    rows = rows or list(range(len(texts)))
    history = torch.full((max(rows) + 1, max(map(len, texts)) + 5), 3)  # stale tokens beyond
    for row, text in zip(rows, texts, strict=True):
        history[row, : len(text)] = torch.tensor(text)
    lengths = torch.tensor([len(text) - 1 for text in texts])
    index = torch.tensor(rows)
    return StepState(
        index, lengths, history[index, lengths], history[index, (lengths - 1).clamp(min=0)],
        history, lengths.tolist(),
    )  # fmt: skip


def brute_force(row: list[int], min_n: int, max_n: int, gamma: int) -> list[int] | None:
    for n in range(min(max_n, len(row) - 1), min_n - 1, -1):
        for start in range(len(row) - n - 1, -1, -1):
            if row[start : start + n] == row[-n:]:
                copy = list(row)
                for offset in range(gamma):
                    copy.append(copy[start + n + offset])
                return copy[len(row) :]
    return None


@pytest.mark.parametrize(("min_n", "max_n"), [(1, 1), (1, 4), (2, 4), (3, 3)])
def test_matches_brute_force(min_n: int, max_n: int) -> None:
    generator = torch.Generator().manual_seed(min_n * 10 + max_n)
    texts = [
        torch.randint(0, 3, (int(n),), generator=generator).tolist()
        for n in torch.randint(1, 40, (200,), generator=generator)
    ]
    rows = torch.randperm(200, generator=generator).tolist()
    draft = NgramDrafter(max_n, min_n).propose(make_state(texts, rows), 5)
    assert draft.probs is None
    for text, tokens, length in zip(
        texts, draft.tokens.tolist(), draft.lengths.tolist(), strict=True
    ):
        expected = brute_force(text, min_n, max_n, 5)
        assert length == (0 if expected is None else 5), text
        if expected is not None:
            assert tokens == expected, text


def test_repetition_extends_past_the_end_of_the_history() -> None:
    draft = NgramDrafter().propose(make_state([[9, 1, 2, 1, 2, 1, 2]]), 5)
    assert draft.tokens.tolist() == [[1, 2, 1, 2, 1]]


def test_prefers_longer_over_more_recent() -> None:
    tokens = torch.tensor([[1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3]])
    match = longest_recent_match(tokens, torch.tensor([10]), 2, 3)
    assert (match.end.item(), match.length.item()) == (2, 3)


def test_stale_tokens_beyond_the_row_are_not_matched() -> None:
    state = make_state([[1, 2, 9]])
    state.tokens[0, 3:] = torch.tensor([2, 9, 4, 4, 4])
    assert NgramDrafter(2, 1).propose(state, 3).lengths.tolist() == [0]


def test_single_token_row_has_no_match() -> None:
    assert NgramDrafter(4, 1).propose(make_state([[5]]), 2).lengths.tolist() == [0]


@pytest.mark.parametrize(("low", "high"), [(0, 2), (3, 2)])
def test_rejects_bad_sizes(low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"min {low}, max {high}"):
        NgramDrafter(high, low)


class _Constant(StatelessDrafter):
    """Proposes token 6 with probability 1/2, and remembers being told to forget."""

    name = "constant"

    def __init__(self) -> None:
        self.forgot = 0

    def propose(self, state: StepState, gamma: int) -> Draft:
        B = len(state.host_lengths)
        probs = torch.zeros(B, gamma, 8)
        probs[..., 6:] = 0.5
        return Draft(torch.full((B, gamma), 6), probs, torch.full((B,), gamma))

    def forget_drafts(self, state: StepState) -> None:
        self.forgot += 1


def test_hybrid_overrides_only_long_matches() -> None:
    model = _Constant()
    hybrid = HybridDrafter(model, threshold=3)
    draft = hybrid.propose(make_state([[1, 2, 3, 4, 1, 2, 3], [1, 2, 4, 5, 1, 2]]), 2)
    assert draft.tokens.tolist() == [[4, 1], [6, 6]]
    assert draft.probs is not None
    assert draft.probs[0].tolist() == torch.eye(8)[[4, 1]].tolist()
    assert draft.probs[1, :, 6].tolist() == [0.5, 0.5]
    assert model.forgot == 1
    assert hybrid.name == "constant+ngram"


def test_hybrid_threshold_must_be_reachable() -> None:
    with pytest.raises(ValueError, match="threshold 5"):
        HybridDrafter(_Constant(), NgramDrafter(4, 2), threshold=5)

"""What a round hands a drafter, and a draft of nothing."""

from __future__ import annotations

import torch

from decoder.drafters.base import empty_draft
from decoder.round import StepState


def make_state() -> StepState:
    lengths = torch.tensor([4, 9])
    tokens = torch.zeros(2, 20, dtype=torch.long)
    return StepState(torch.tensor([1, 0]), lengths, lengths, lengths, tokens, [4, 9])


def test_state_reads_rows_back_once() -> None:
    state = make_state()
    assert state.host_rows == [1, 0]
    assert state.rows_and_lengths() == [(1, 4), (0, 9)]


def test_empty_draft_proposes_nothing() -> None:
    draft = empty_draft(make_state(), 3)
    assert draft.tokens.shape == (2, 3) and draft.gamma == 3
    assert draft.lengths.tolist() == [0, 0]

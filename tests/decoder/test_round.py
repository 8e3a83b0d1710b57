"""Drafts cut to what rows have room for, and to what they hold."""

from __future__ import annotations

import torch

from decoder.round import Draft


def test_lengths_are_at_most_the_columns() -> None:
    """A drafter may have cut its tokens and not said so: nothing would follow a last draft."""
    draft = Draft(torch.tensor([[9], [9], [9]]), None, torch.tensor([4, 1, -2]))
    limited = draft.limited([3, 3, 3])
    assert limited is not None and limited.lengths.tolist() == [1, 1, 0]
    limited = draft.limited([0, 3, 3])
    assert limited is not None and limited.lengths.tolist() == [0, 1, 0]

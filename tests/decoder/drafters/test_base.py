"""The draft chain: which positions and which prefix every step is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from decoder.drafters.base import DraftChain, empty_draft
from decoder.round import StepState


def make_state() -> StepState:
    lengths = torch.tensor([4, 9])
    tokens = torch.zeros(2, 20, dtype=torch.long)
    return StepState(torch.tensor([1, 0]), lengths, lengths, lengths, tokens, [4, 9])


class Recorder:
    """Draws token ``step`` and remembers what it was asked; ``undefined`` by step and row."""

    def __init__(self, undefined: Sequence[Sequence[bool]] = ((False, False),) * 3) -> None:
        self.calls: list[tuple[list[int], Any, list[int]]] = []
        self._undefined = torch.tensor(undefined)

    def distribution(
        self, logits: Tensor, rows: Tensor, positions: Tensor, prefix: Tensor | None
    ) -> Any:
        self._asked = (positions[:, 0].tolist(), None if prefix is None else prefix.tolist())
        undefined = self._undefined[len(self.calls)][:, None]
        return SimpleNamespace(probs=logits, argmax=None, undefined=undefined)

    def draw_draft(self, probs: Any, rows: Tensor, positions: Tensor) -> Tensor:
        self.calls.append((*self._asked, positions.tolist()))
        return torch.full_like(rows, len(self.calls))


def test_noise_position_and_prefix_advance_with_every_step() -> None:
    """Two steps drawn at one position would share their noise, which biases sampled output."""
    sampler = Recorder()
    chain = DraftChain(sampler, make_state(), 3)  # type: ignore[arg-type]
    for step in range(3):
        chain.draw(torch.full((2, 1, 8), float(step)))
    assert sampler.calls == [
        ([5, 10], None, [5, 10]),
        ([6, 11], [[1], [1]], [6, 11]),
        ([7, 12], [[1, 2], [1, 2]], [7, 12]),
    ]
    draft = chain.finish()
    assert draft.tokens.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert draft.probs is not None and draft.probs[0, :, 0].tolist() == [0.0, 1.0, 2.0]
    assert draft.lengths.tolist() == [3, 3]


def test_a_draft_ends_before_what_its_model_left_undefined() -> None:
    sampler = Recorder([[False, False], [False, True], [True, False]])
    chain = DraftChain(sampler, make_state(), 3)  # type: ignore[arg-type]
    for _ in range(3):
        chain.draw(torch.zeros(2, 1, 8))
    assert chain.finish().lengths.tolist() == [2, 1]


def test_state_reads_rows_back_once() -> None:
    state = make_state()
    assert state.host_rows == [1, 0]
    assert state.rows_and_lengths() == [(1, 4), (0, 9)]


def test_empty_draft_proposes_nothing() -> None:
    draft = empty_draft(make_state(), 3)
    assert draft.tokens.shape == (2, 3) and draft.gamma == 3
    assert draft.lengths.tolist() == [0, 0]

"""The draft chain: which positions and which prefix every step is drawn with."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from decoder.drafters.chain import DraftChain, shared_probs
from decoder.sampling import Sampler

ROWS, LENGTHS = torch.tensor([1, 0]), torch.tensor([4, 9])


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
    chain = DraftChain(sampler, ROWS, LENGTHS, 3)  # type: ignore[arg-type]
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
    chain = DraftChain(sampler, ROWS, LENGTHS, 3)  # type: ignore[arg-type]
    for _ in range(3):
        chain.draw(torch.zeros(2, 1, 8))
    assert chain.finish().lengths.tolist() == [2, 1]


@torch.inference_mode()
def test_distributions_of_fewer_steps_are_moved_to_where_graphs_look() -> None:
    """A draft that was cut lies in the same memory, in longer rows."""
    sampler = Sampler(3, 5, torch.device("cpu"))
    whole = sampler.draft_probs(3, 4, torch.float32)
    whole.copy_(torch.arange(60.0).view(3, 4, 5))
    expected = whole.clone()
    assert shared_probs(sampler, whole[:2], 3).data_ptr() == whole.data_ptr()
    assert torch.equal(whole, expected)
    for steps in (1, 3):
        whole.copy_(expected)
        shared = shared_probs(sampler, whole[:2, :steps], 3)
        assert torch.equal(shared[:2], expected[:2, :steps])

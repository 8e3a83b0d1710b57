"""A head of the decoder's against the training script's own forward, at every draft depth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decoder.model.attention import Placement, placed
from decoder.model.cache import RaggedCache


def check_depths(head: Any, tokens: Tensor, features: Tensor, expected: list[Tensor]) -> None:
    """Wherever true features end, the head's own output goes on from them as it does in training.

    Args:
        head: of the decoder.
        tokens: ``[2, L]``.
        features: ``[2, L, H]``.
        expected: of each depth, ``[2, L, H]``.
    """
    cache, rows = RaggedCache(3, 64), torch.tensor([2, 0])
    length, depths = tokens.shape[1], len(expected)

    def run(ids: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        cache.select(rows, positions)
        placement = Placement(rows, positions, length)
        with placed(placement):
            output: Tensor = head(ids, hidden, cache, placement)
            return output

    for end in range(1, length - depths):
        positions = torch.arange(end).repeat(2, 1)
        hidden = run(tokens[:, :end], features[:, :end], positions)
        torch.testing.assert_close(hidden, expected[0][:, :end], atol=1e-5, rtol=1e-4)
        for depth in range(1, depths):
            at = end - 1 + depth
            hidden = run(tokens[:, at, None], hidden[:, -1:], torch.full((2, 1), at))
            torch.testing.assert_close(hidden[:, 0], expected[depth][:, at], atol=1e-5, rtol=1e-4)

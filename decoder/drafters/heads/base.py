"""What a drafter asks of a head, whatever its layout, and what heads are made of."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from decoder.model.attention import Placement
from decoder.model.cache import RaggedCache


class Head(Protocol):
    """A small model on a target's features; it keeps keys and values in a cache of its own."""

    def fuse(self, features: Tensor) -> Tensor:
        """Target features ``[B, Q, n * H_t]`` to what ``forward`` takes in their place."""

    def __call__(
        self, tokens: Tensor, hidden: Tensor, cache: RaggedCache, placement: Placement
    ) -> Tensor:
        """One pass over pairs of a token and a hidden state.

        Args:
            tokens: ``[B, Q]`` int64 target token ids.
            hidden: ``[B, Q, H]`` fused features, or this function's own earlier output.
            cache: this head's cache, already told rows and positions by ``select``.
            placement: the same rows and positions for attention.

        Returns:
            ``[B, Q, H]``, to be read by ``logits`` and fed back as ``hidden``.
        """

    def logits(self, hidden: Tensor, vocab_size: int) -> Tensor:
        """``[B, Q, H]`` to logits ``[B, Q, any]`` over the target's ids, ``vocab_size`` of them."""


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen layer around these tensors."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made

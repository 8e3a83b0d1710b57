"""Element-wise functions whose last bits are a row's own."""

from __future__ import annotations

from torch import Tensor

_VECTORS = 64  # numbers that the widest loops of torch take at once


def rows_apart(x: Tensor) -> Tensor:
    """``x`` with rows, of the last axis, that are whole vectors or do not follow each other.

    torch computes what fills no vector by other instructions than the rest. Where rows lie one
    after the other that is the end of all of them, and a token's bits depend on how many there are;
    a gap after each makes it a loop of its own. Linear layers of ours leave such gaps by
    themselves, but not what a model adds to them.
    """
    width = x.shape[-1]
    if width % _VECTORS == 0:
        return x.contiguous()
    return x.new_empty(*x.shape[:-1], width + 1)[..., :width].copy_(x)

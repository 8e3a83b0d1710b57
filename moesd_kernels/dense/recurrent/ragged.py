"""How rows of unequal length go through a recurrence, whatever its step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def advance(
    states: Tensor,
    rows: Tensor,
    keep: Tensor,
    counts: Tensor,
    out: Tensor,
    step: Callable[[Tensor, int, int], tuple[Tensor, Tensor]],
) -> Tensor:
    """Take every row through its tokens; keep the state behind the last accepted one.

    Args:
        states: ``[R, ...]``, written at the rows that keep a token.
        rows: ``[B]`` row of each sequence's state; keep, counts: ``[B]``, as in ``recurrent``.
        out: ``[B, Q, ...]`` zeros, written where there is a token.
        step: the state before token t of sequence b, b and t to the state after it and its output.

    Returns:
        out.
    """
    ragged = zip(rows.tolist(), keep.tolist(), counts.tolist(), strict=True)
    for b, (row, kept, count) in enumerate(ragged):
        state = states[row]
        for t in range(count):
            state, out[b, t] = step(state, b, t)
            if t + 1 == kept:
                states[row] = state
    return out

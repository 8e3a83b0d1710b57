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

    Raises:
        ValueError: more tokens than there are, more kept than that, or a row used twice.
    """
    ragged = list(zip(rows.tolist(), keep.tolist(), counts.tolist(), strict=True))
    for row, kept, count in ragged:
        if not 0 <= kept <= count <= out.shape[1]:
            raise ValueError(
                f"keep and counts must be in 0 <= keep <= counts <= {out.shape[1]}, "
                f"got {kept} and {count}"
            )
        if kept and sum(row == other for other, *_ in ragged) > 1:
            raise ValueError(f"rows that keep a token must be named once, got {row} twice")
    for b, (row, kept, count) in enumerate(ragged):
        state = states[row]
        for t in range(count):
            state, out[b, t] = step(state, b, t)
            if t + 1 == kept:
                states[row] = state
    return out

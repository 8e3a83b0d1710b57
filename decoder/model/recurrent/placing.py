"""Where the tokens of a forward stand, for layers that move on a state.

A row's state has taken in its first tokens and no more than are settled: tokens that may yet be
rejected wait in a ring, at their position modulo its length. A forward goes on from the state with
what it has to replay from the ring, then with its own tokens; the settled ones among both move the
state for good, the others a copy of it. All of this is the same in every layer of a forward, so it
is found out once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Replay(NamedTuple):
    """How rows go on from their states.

    Attributes:
        rows: ``[B]`` int64 cache rows.
        restarted: ``[n]`` int64 rows that begin a text, from a state of zeros.
        keep: ``[B]`` int64, how many of a row's tokens move its state.
        counts: ``[B]`` int64, tokens of a row, replayed ones included.
        most: that a row replays.
        held: places in the ring of the replayed tokens, ``[B * most]``.
        order: ``[B * N]`` places of a row's tokens, one after the other, in what is held followed
            by the forward's own ``[B * Q]``; ``None`` where all rows replay ``most``.
        outputs: ``[B * Q]`` places of the forward's own tokens in ``[B * N]``.
        after: ``[2, rows]`` int64: tokens that each state has taken in, and that are in its ring or
            were before it, afterwards.
    """

    rows: Tensor
    restarted: Tensor
    keep: Tensor
    counts: Tensor
    most: int
    held: Tensor
    order: Tensor | None
    outputs: Tensor
    after: Tensor

    def sequence(self, ring: Tensor, inputs: Tensor) -> Tensor:
        """Inputs ``[B, Q, ...]`` of a forward behind those to replay, ``[B, N, ...]``.

        ``ring``: ``[rows * length, ...]``.
        """
        if not self.most:
            return inputs
        held, shape = ring.index_select(0, self.held), (len(self.rows), -1)
        if self.order is None:
            return torch.cat([held.unflatten(0, shape), inputs], dim=1)
        return (
            torch.cat([held, inputs.flatten(0, 1)]).index_select(0, self.order).unflatten(0, shape)
        )

    def own(self, outputs: Tensor) -> Tensor:
        """What the forward's own tokens ``[B, Q, ...]`` get of outputs ``[B, N, ...]``."""
        if self.order is None:
            return outputs[:, self.most :]
        shape = len(self.rows), -1
        return outputs.flatten(0, 1).index_select(0, self.outputs).unflatten(0, shape)


class Placing:
    """The tokens of one forward.

    Args:
        rows: ``[B]`` int64 cache rows, no two the same.
        positions: ``[B, Q]`` int64: one after the other, then -1 where padding.
        settled: ``[B]`` int64, how many of a row's tokens, from its text's first on, nobody will
            take back; ``None`` is those before this forward's.
    """

    def __init__(self, rows: Tensor, positions: Tensor, settled: Tensor | None) -> None:
        self.rows, self.positions = rows, positions
        self.counts = (positions >= 0).sum(1)
        self._first = positions[:, 0]
        self._settled = self._first if settled is None else settled
        self._written: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._before: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        self._replays: dict[tuple[int, int], tuple[Tensor, Replay]] = {}

    def write(self, ring: Tensor, inputs: Tensor, length: int) -> None:
        """Leave inputs ``[B, Q, ...]`` in a ring ``[rows * length, ...]``."""
        if length not in self._written:
            self._written[length] = self._places(length)
        own, places = self._written[length]
        flat = inputs.flatten(0, 1)
        ring.index_copy_(0, places, flat if own is None else flat.index_select(0, own))

    def _places(self, length: int) -> tuple[Tensor | None, Tensor]:
        """The last ``length`` tokens of each row among ``[B * Q]``, and their places in a ring."""
        B, Q = self.positions.shape
        column = torch.arange(Q, device=self.rows.device)
        counts = self.counts[:, None]
        own = ((column < counts) & (column >= counts - length)).flatten().nonzero()[:, 0]
        places = (self.rows[:, None] * length + self.positions.remainder(length)).flatten()
        return (None, places) if len(own) == B * Q else (own, places[own])

    def before(self, ring: Tensor, count: int, length: int) -> Tensor:
        """What a ring ``[rows * length, C]`` holds of the ``count`` positions before the tokens.

        Returns:
            ``[B, count, C]``, zeros before a text's first token.
        """
        if (count, length) not in self._before:
            steps = torch.arange(-count, 0, device=self.rows.device)
            positions = self._first[:, None] + steps
            places = self.rows[:, None] * length + positions.remainder(length)
            none = (positions < 0)[..., None]
            self._before[count, length] = places.flatten(), none if bool(none.any()) else None
        places, missing = self._before[count, length]
        held = ring.index_select(0, places).unflatten(0, (len(self.rows), count))
        return held if missing is None else held.masked_fill_(missing, 0)

    def replay(self, before: Tensor, length: int) -> Replay:
        """How a layer goes on.

        Args:
            before: what was ``after`` of its last forward; zeros at first. It is never written to:
                what has changed is another tensor.
            length: of its ring.

        Raises:
            ValueError: a row's tokens do not follow on those that its state and its ring have, or
                more of them might be taken back than the ring holds.
        """
        key = id(before), length
        if key not in self._replays:
            self._replays[key] = before, self._replay(before, length)
        return self._replays[key][1]

    def _replay(self, before: Tensor, length: int) -> Replay:
        rows, counts, (B, Q) = self.rows, self.counts, self.positions.shape
        empty = counts == 0
        begins = (self._first == 0) & ~empty
        start, fed = before[:, rows].masked_fill(begins, 0)
        first = torch.where(empty, start, self._first)
        settled = torch.where(empty, start, self._settled)
        held, end = first - start, first + counts
        self._check(start, fed, settled, end, length)
        fed = torch.where(empty, fed, end)
        after = before.index_copy(1, rows, torch.stack([settled, fed]))
        N, most = int((held + counts).max()), int(held.max())
        waiting, batch = held[:, None], torch.arange(B, device=rows.device)[:, None]
        column = torch.arange(N, device=rows.device)
        places = rows[:, None] * length + (start[:, None] + column[:most]).remainder(length)
        fresh = B * most + batch * Q + (column - waiting).clamp(max=Q - 1)
        order = torch.where(column < waiting, batch * most + column, fresh).flatten()
        outputs = batch * N + (waiting + torch.arange(Q, device=rows.device)).clamp(max=N - 1)
        return Replay(
            rows,
            rows[begins],
            settled - start,
            held + counts,
            most,
            places.flatten(),
            None if bool((held == most).all()) else order,
            outputs.flatten(),
            after,
        )

    def _check(self, start: Tensor, fed: Tensor, settled: Tensor, end: Tensor, length: int) -> None:
        """Waits for the device: what these layers compute is not captured in graphs."""
        first = end - self.counts
        follows = (start <= first) & (first <= fed)
        if not bool((follows & (start <= settled) & (settled <= end)).all()):
            raise ValueError(
                "expected tokens that follow on those that a row's state and ring hold, got rows "
                f"{self.rows.tolist()} from positions {first.tolist()}, {settled.tolist()} of them "
                f"settled, with states at {start.tolist()} and rings up to {fed.tolist()}"
            )
        undecided = int((end - settled).max())
        if undecided > length:
            raise ValueError(
                f"expected at most {length} tokens of a row that may be taken back, got {undecided}"
            )

"""Static-shape forwards, captured as CUDA graphs per (batch bucket, queries, view).

A decode step on a GPU is launch-bound: hundreds of small kernels that Python cannot issue fast
enough. Here a forward runs on buffers of fixed size, rows padded to a bucket with position -1, so
that it can be captured once and replayed. The same code runs without capture on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .capture import capture

Outputs = tuple[Tensor, Tensor | None]
StaticForward = Callable[..., Outputs]

_MIN_VIEW = 256
# Shapes kept. A run of a hundred rows that end one by one needs some sixty, each the size of its
# logits; what is dropped is captured again when it comes back.
MAX_ENTRIES = 128


class Key(NamedTuple):
    """What one captured graph is for; everything else is data in its buffers."""

    batch: int
    queries: int
    view: int
    hidden_layers: tuple[int, ...] | None
    logits_columns: int | None


class _Entry(NamedTuple):
    input_ids: Tensor  # [batch, queries]
    rows: Tensor  # [batch]
    positions: Tensor  # [batch, queries]
    logits_positions: Tensor | None  # [batch, n]
    graph: Any  # torch.cuda.CUDAGraph | None
    outputs: list[Outputs]


class ForwardGraphs:
    """Runs a forward through fixed buffers, captured where ``capture`` says so.

    Args:
        max_batch_size: largest batch.
        max_view: positions of a cache row, a multiple of 64.
        device: of the buffers.
        capture: replay CUDA graphs; otherwise call ``forward`` on the padded buffers each time.
    """

    def __init__(
        self, max_batch_size: int, max_view: int, device: torch.device, capture: bool
    ) -> None:
        self._max_batch_size, self._max_view = max_batch_size, max_view
        self._device, self._capture = device, capture
        self._entries: dict[Key, _Entry] = {}  # the least recently used first
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Drop every graph: what was captured is no longer what the forward does."""
        self._entries.clear()
        self._pool = None  # went with its last graph

    def __call__(
        self,
        forward: StaticForward,
        input_ids: Tensor,
        rows: Tensor,
        positions: Tensor,
        length: int,
        hidden_layers: Sequence[int] | None = None,
        logits_positions: Tensor | None = None,
    ) -> Outputs:
        """The forward of ``[B, Q]`` tokens, computed in a bucket of rows.

        Args:
            forward: ``(input_ids, rows, positions, view, hidden_layers, logits_positions)`` to
                ``(logits, hidden or None)``, the same in every call; no host synchronisation,
                shapes a function of shapes. It is not kept: it is mostly a method of the owner.
            length: positions that some query may see.

        Returns:
            Views of static logits, valid until the next call (the graphs share their memory), and
            a copy of the hidden states, which a drafter may keep for a round.
        """
        B, Q = input_ids.shape
        layers = None if hidden_layers is None else tuple(hidden_layers)
        columns = None if logits_positions is None else logits_positions.shape[1]
        key = Key(self.bucket(B), Q, self.view(length), layers, columns)
        entry = self._entry(key)
        entry.input_ids[:B].copy_(input_ids)
        entry.rows[:B].copy_(rows)
        entry.positions[:B].copy_(positions)
        # Rows left over from a larger batch would write into live ones.
        entry.positions[B:].fill_(-1)
        if entry.logits_positions is not None and logits_positions is not None:
            entry.logits_positions[:B].copy_(logits_positions)
        if not self._capture:
            entry.outputs[:] = [_run(forward, key, entry)]
        elif entry.graph is None:
            entry = self._entries[key] = self._captured(forward, key, entry)
            entry.graph.replay()
        else:
            entry.graph.replay()
        logits, hidden = entry.outputs[0]
        return logits[:B], None if hidden is None else hidden[:B].clone()

    def bucket(self, batch: int) -> int:
        """Rows computed for ``batch`` live ones: powers of two up to 8, then multiples of 8."""
        size = 1
        while size < batch and size < 8:
            size *= 2
        if batch > size:
            size = -(-batch // 8) * 8
        return min(size, self._max_batch_size)

    def view(self, length: int) -> int:
        """Positions looked at: powers of two from 256."""
        view = _MIN_VIEW
        while view < length:
            view *= 2
        return min(view, self._max_view)

    def _entry(self, key: Key) -> _Entry:
        """The buffers of ``key``, now the most recently used."""
        entry = self._entries.pop(key, None) or self._new_entry(key)
        self._entries[key] = entry
        if len(self._entries) > MAX_ENTRIES:
            del self._entries[next(iter(self._entries))]
        return entry

    def _new_entry(self, key: Key) -> _Entry:
        zeros = partial(torch.zeros, dtype=torch.int64, device=self._device)
        logits_positions = None
        if key.logits_columns is not None:
            logits_positions = zeros((key.batch, key.logits_columns))
        return _Entry(
            zeros((key.batch, key.queries)),
            zeros((key.batch,)),
            zeros((key.batch, key.queries)),
            logits_positions,
            None,
            [],
        )

    def _captured(self, forward: StaticForward, key: Key, entry: _Entry) -> _Entry:
        """Capture on the buffers as they are: repeating a forward writes the same places again."""
        try:
            graph, outputs = capture(partial(_run, forward, key, entry), self._pool)
        except RuntimeError as error:
            error.add_note("decoding is captured in CUDA graphs; static=False runs without them")
            raise
        self._pool = graph.pool()
        return entry._replace(graph=graph, outputs=[outputs])


def _run(forward: StaticForward, key: Key, entry: _Entry) -> Outputs:
    return forward(
        entry.input_ids,
        entry.rows,
        entry.positions,
        key.view,
        key.hidden_layers,
        entry.logits_positions,
    )

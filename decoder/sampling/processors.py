"""Logits processors of single requests: any function of the tokens before a position.

What depends on a prefix alone is exact under speculation when every position is given its own. The
target's logits go through it; a drafter's do not need to, for a draft may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from decoder.round import Draft


class LogitsProcessor(Protocol):
    """What a request may have done to its logits before anything else looks at them."""

    def __call__(self, output_ids: Sequence[int], logits: Tensor, /) -> Tensor:
        """New logits ``[V]``.

        It may be called more than once for a position, and for tokens that are thrown away later,
        but for none that it made impossible itself or that follow a stop token.

        Args:
            output_ids: the request's tokens since its prompt.
            logits: ``[V]`` fp32 (fp64 for fp64 logits), its own to change.
        """


@dataclass(slots=True)
class _Row:
    process: LogitsProcessor
    stop_ids: frozenset[int]
    output_ids: list[int] = field(default_factory=list)


class ProcessorTable:
    """The processors of the rows that have one, and what those rows have said."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}

    @property
    def active(self) -> bool:
        """Whether any row has one."""
        return bool(self._rows)

    def admit(self, row: int, process: LogitsProcessor | None, stop_ids: Iterable[int]) -> None:
        """Start a request in ``row``; nothing follows its ``stop_ids``."""
        self.release(row)
        if process is not None:
            self._rows[row] = _Row(process, frozenset(stop_ids))

    def release(self, row: int) -> None:
        """End the request in ``row``, if there is one."""
        self._rows.pop(row, None)

    def commit(self, rows: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Take over emitted tokens: the first ``counts[b]`` of ``tokens`` ``[B, n]``."""
        if not self._rows:
            return
        emitted = zip(rows.tolist(), tokens.tolist(), counts.tolist(), strict=True)
        for row, ids, count in emitted:
            if row in self._rows:
                self._rows[row].output_ids += ids[:count]

    def apply(self, logits: Tensor, rows: Tensor, draft: Draft | None) -> Tensor:
        """Processed logits ``[B, Q, V]``; the very ones given where no row has a processor.

        Positions that no accepted token can precede stay as they are. Waits for the device.

        Args:
            logits: ``[B, Q, V]`` floating, not modified.
            rows: ``[B]`` int64.
            draft: what stands between the positions, ``G = Q - 1``; ``None`` for Q = 1.
        """
        if not self._rows:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        host_rows = rows.tolist()
        drafted: list[list[int]] = [[] for _ in host_rows]
        if draft is not None:
            pairs = zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True)
            drafted = [tokens[:length] for tokens, length in pairs]
        for b, row in enumerate(host_rows):
            if row in self._rows:
                self._process(self._rows[row], logits[b], drafted[b])
        return logits

    def _process(self, row: _Row, logits: Tensor, drafted: list[int]) -> None:
        """One row's positions ``[Q, V]``, in place and in order."""
        for position in range(len(drafted) + 1):
            prefix = row.output_ids + drafted[:position]
            logits[position] = row.process(prefix, logits[position].clone())
            if position == len(drafted):
                return
            follows = drafted[position] not in row.stop_ids
            if not follows or not bool(logits[position, drafted[position]] > float("-inf")):
                return

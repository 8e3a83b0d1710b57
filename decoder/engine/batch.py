"""The live sequences: device tensors for the step, Python integers for the host.

A sequence keeps its row, which is its place in every KV cache and table, from admission to its
end. Tensors of a step hold the live ones in order of admission; rows that fall free are given out
again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from decoder.requests.outputs import TokenLogprob
from decoder.requests.reader import Request
from decoder.requests.sequence import ActiveSequence
from decoder.round import StepState, Verdict
from decoder.sampling import Probs, Sampler


class LiveBatch:
    """State of the running sequences.

    Args:
        max_batch_size: number of rows.
        width: positions per row in the token history, drafts of the last round included.
        device: of the tensors.
    """

    def __init__(self, max_batch_size: int, width: int, device: torch.device) -> None:
        self.sequences: list[ActiveSequence] = []
        self.max_batch_size = max_batch_size
        self.free_rows = list(range(max_batch_size))
        self.device = device
        # The row after the last is nobody's: where a graph's padding looks and writes.
        zeros = partial(torch.zeros, dtype=torch.int64, device=device)
        self._history, empty = zeros((max_batch_size + 1, width)), zeros(0)
        # By row, the length at which nothing is left to draft: one token is still to come.
        self.last = zeros(max_batch_size + 1)
        self.state = StepState(empty, empty, empty, empty, self._history, [], [])
        self._idled = 0  # rows that were free, summed over the rounds since the last admission

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def requests(self) -> list[Request]:
        """Of the live sequences, in their order."""
        return [sequence.request for sequence in self.sequences]

    def startable(self, rounds: float) -> int:
        """Requests to start now: as many as rows are free, or none while they are few.

        A prefill costs about a round, an idle row costs 1 / B of every round it waits; with L
        rounds per sequence the sum is least at B * sqrt(2 / L) rows at a time. No longer than idle
        rows have cost that prefill, or what runs on far beyond the average would block the others.

        Args:
            rounds: L, that a sequence takes on average.
        """
        free, size = len(self.free_rows), self.max_batch_size
        enough = max(1, int(size * math.sqrt(2.0 / max(rounds, 2.0))))
        return free if free >= enough or self._idled >= size or not len(self) else 0

    def take_rows(self, count: int) -> list[int]:
        """Reserve the lowest free rows: the portable attention need not copy leading rows."""
        taken, self.free_rows = self.free_rows[:count], self.free_rows[count:]
        return taken

    def give_back(self, rows: Sequence[int]) -> None:
        """Free rows that no sequence lives in."""
        self.free_rows = sorted({*self.free_rows, *rows})

    def write_prompts(self, rows: Tensor, token_ids: Tensor) -> None:
        """Put right-padded prompts ``[R, L]`` into the history."""
        self._history[rows, : token_ids.shape[1]] = token_ids

    def append(
        self,
        sequences: Sequence[ActiveSequence],
        rows: Tensor,
        lengths: Tensor,
        current: Tensor,
        previous: Tensor,
    ) -> None:
        """Add sequences whose prompts are in the caches; all tensors ``[R]``.

        As every change of the batch: all of it happens or, when it raises, nothing.
        """
        self._history[rows, lengths] = current  # nothing reads it before the state says so
        longest = [sequence.request.max_new_tokens - 2 for sequence in sequences]
        self.last[rows] = lengths + torch.tensor(longest, device=self.device)
        old = self.state
        state = StepState(
            torch.cat([old.rows, rows]),
            torch.cat([old.lengths, lengths]),
            torch.cat([old.current, current]),
            torch.cat([old.previous, previous]),
            self._history,
            old.host_lengths + [len(sequence.request.prompt_ids) for sequence in sequences],
            old.host_rows + [sequence.row for sequence in sequences],
        )
        self.state, self.sequences = state, [*self.sequences, *sequences]
        self._idled = 0

    def advance(self, verdict: Verdict, host_accepted: Sequence[int]) -> None:
        """Commit a round: ``lengths += accepted + 1``, and that is the whole rollback."""
        old = self.state
        moved = self.moved(old.rows, old.lengths, old.current, verdict.accepted, verdict.tokens)
        self.become(moved, host_accepted)

    def moved(
        self, rows: Tensor, lengths: Tensor, current: Tensor, accepted: Tensor, tokens: Tensor
    ) -> list[Tensor]:
        """Lengths, current and previous tokens after a verdict, written into the history.

        On tensors alone, so that a graph may hold it. All ``[B]`` but ``tokens [B, G + 1]``.
        """
        count = tokens.shape[1]
        steps = torch.arange(1, count + 1, device=self.device)
        # Rejected entries (-1) land beyond the new length; 0 keeps them valid ids.
        written = tokens.clamp(min=0)
        self._history.index_put_((rows[:, None], lengths[:, None] + steps), written)
        if count == 1:
            return [lengths + accepted + 1, written[:, 0], current]
        last = accepted[:, None]
        previous = torch.cat([current[:, None], written], 1).gather(1, last)[:, 0]
        return [lengths + accepted + 1, written.gather(1, last)[:, 0], previous]

    def become(self, moved: Sequence[Tensor], host_accepted: Sequence[int]) -> None:
        """Take what ``moved`` gave for the new state."""
        old, (lengths, current, previous) = self.state, moved
        host_lengths = [n + k + 1 for n, k in zip(old.host_lengths, host_accepted, strict=True)]
        self.state = StepState(
            old.rows, lengths, current, previous, self._history, host_lengths, old.host_rows
        )
        self._idled += len(self.free_rows)

    def remove(self, sequences: Sequence[ActiveSequence]) -> None:
        """Drop sequences; their rows are free now."""
        rows = {sequence.row for sequence in sequences}
        if rows:
            self._keep([i for i, s in enumerate(self.sequences) if s.row not in rows])
            self.give_back(list(rows))

    def taken_rows(self) -> list[int]:
        """Rows that are not free, also those of no sequence yet."""
        return sorted(set(range(self.max_batch_size)).difference(self.free_rows))

    def clear(self) -> None:
        """Drop every sequence."""
        self._keep([])
        self.free_rows = list(range(self.max_batch_size))

    def _keep(self, kept: list[int]) -> None:
        self.state, self.sequences = self.state.select(kept), [self.sequences[i] for i in kept]


def padded(rows: list[list[int]], device: torch.device) -> Tensor:
    """``[R, L]`` int64, right padded with 0."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


def token_logprobs(
    sampler: Sampler,
    sequences: Sequence[ActiveSequence],
    logits: Tensor,
    probs: Probs,
    tokens: Tensor,
) -> list[list[TokenLogprob]]:
    """Per row, log-probabilities of its ``tokens`` ``[B, Q]``; empty where nobody asked."""
    asked = [sequence.request.params.logprobs for sequence in sequences]
    top = max((n for n in asked if n is not None), default=None)
    if top is None:
        return [[] for _ in sequences]
    values = sampler.logprobs(logits, probs, tokens, top)
    columns = (tokens, values.raw, values.processed, values.top_ids, values.top_raw)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        []
        if n is None
        else [
            TokenLogprob(token, raw, processed, tuple(zip(ids[:n], tops[:n], strict=True)))
            for token, raw, processed, ids, tops in zip(*row, strict=True)
        ]
        for n, row in zip(asked, rows, strict=True)
    ]

"""The live sequences: device tensors for the step, Python integers for the host.

A sequence keeps its row, which is its place in every KV cache and table, from admission to its
end. Tensors of a step hold the live ones in order of admission; rows that fall free are given out
again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decoder.requests.outputs import TokenLogprob
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
        self.free_rows = list(range(max_batch_size))
        self.device = device
        self._history = torch.zeros(max_batch_size, width, dtype=torch.int64, device=device)
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        self.state = StepState(empty, empty, empty, empty, self._history, [], [])

    def __len__(self) -> int:
        return len(self.sequences)

    def take_rows(self, count: int) -> list[int]:
        """Reserve the lowest free rows: the portable attention need not copy leading rows."""
        taken, self.free_rows = self.free_rows[:count], self.free_rows[count:]
        return taken

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
        """Add sequences whose prompts are in the caches; all tensors ``[R]``."""
        self._history[rows, lengths] = current
        old = self.state
        self.sequences.extend(sequences)
        self.state = StepState(
            torch.cat([old.rows, rows]),
            torch.cat([old.lengths, lengths]),
            torch.cat([old.current, current]),
            torch.cat([old.previous, previous]),
            self._history,
            old.host_lengths + lengths.tolist(),
            old.host_rows + [sequence.row for sequence in sequences],
        )

    def advance(self, verdict: Verdict, host_accepted: Sequence[int]) -> None:
        """Commit a round: ``lengths += accepted + 1``, and that is the whole rollback."""
        old = self.state
        accepted, tokens = verdict
        count = tokens.shape[1]
        steps = torch.arange(1, count + 1, device=self.device)
        # Rejected entries (-1) land beyond the new length; 0 keeps them valid ids.
        written = tokens.clamp(min=0)
        self._history.index_put_((old.rows[:, None], old.lengths[:, None] + steps), written)
        if count == 1:
            current, previous = written[:, 0], old.current
        else:
            last = accepted[:, None]
            current = written.gather(1, last)[:, 0]
            previous = torch.cat([old.current[:, None], written], 1).gather(1, last)[:, 0]
        self.state = StepState(
            old.rows,
            old.lengths + accepted + 1,
            current,
            previous,
            self._history,
            [n + k + 1 for n, k in zip(old.host_lengths, host_accepted, strict=True)],
            old.host_rows,
        )

    def remove(self, sequences: Sequence[ActiveSequence]) -> list[int]:
        """Drop sequences; returns their rows, which are free now."""
        rows = {sequence.row for sequence in sequences}
        if rows:
            self._keep([i for i, s in enumerate(self.sequences) if s.row not in rows])
            self.free_rows = sorted([*self.free_rows, *rows])
        return sorted(rows)

    def clear(self) -> list[int]:
        """Drop every sequence; returns the rows that were taken, also by no sequence yet."""
        everything = range(self._history.shape[0])
        taken = sorted(set(everything).difference(self.free_rows))
        self._keep([])
        self.free_rows = list(everything)
        return taken

    def _keep(self, kept: list[int]) -> None:
        old = self.state
        index = torch.tensor(kept, dtype=torch.int64, device=self.device)
        self.sequences = [self.sequences[i] for i in kept]
        self.state = StepState(
            old.rows[index],
            old.lengths[index],
            old.current[index],
            old.previous[index],
            self._history,
            [old.host_lengths[i] for i in kept],
            [old.host_rows[i] for i in kept],
        )


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

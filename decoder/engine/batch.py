"""The live rows: device tensors for the step, Python integers for the host.

Rows are removed as sequences finish and appended as slots are refilled; a row's slot, and with it
its place in every KV cache, never changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decoder.drafters.base import StepState
from decoder.requests.outputs import TokenLogprob
from decoder.requests.sequence import ActiveSequence
from decoder.sampling import Probs, Sampler
from decoder.sampling.verdict import Verdict


class LiveBatch:
    """State of the running sequences.

    Args:
        max_batch_size: number of slots.
        width: positions per slot in the token history, drafts of the last round included.
        device: of the tensors.
    """

    def __init__(self, max_batch_size: int, width: int, device: torch.device) -> None:
        self.sequences: list[ActiveSequence] = []
        self.free_slots = list(range(max_batch_size))
        self.device = device
        self._history = torch.zeros(max_batch_size, width, dtype=torch.int64, device=device)
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        self.state = StepState(empty, empty, empty, empty, self._history, [], [])

    def __len__(self) -> int:
        return len(self.sequences)

    def take_slots(self, count: int) -> list[int]:
        """Reserve the lowest free slots: the portable attention need not copy leading rows."""
        taken, self.free_slots = self.free_slots[:count], self.free_slots[count:]
        return taken

    def write_prompts(self, slots: Tensor, token_ids: Tensor) -> None:
        """Put right-padded prompts ``[R, L]`` into the history."""
        self._history[slots, : token_ids.shape[1]] = token_ids

    def append(
        self,
        sequences: Sequence[ActiveSequence],
        slots: Tensor,
        lengths: Tensor,
        current: Tensor,
        previous: Tensor,
    ) -> None:
        """Add rows whose prompts are in the caches; all tensors ``[R]``."""
        self._history[slots, lengths] = current
        old = self.state
        self.sequences.extend(sequences)
        self.state = StepState(
            torch.cat([old.slots, slots]),
            torch.cat([old.lengths, lengths]),
            torch.cat([old.current, current]),
            torch.cat([old.previous, previous]),
            self._history,
            old.host_lengths + lengths.tolist(),
            old.host_slots + [sequence.slot for sequence in sequences],
        )

    def advance(self, verdict: Verdict, host_accepted: Sequence[int]) -> None:
        """Commit a round: ``lengths += accepted + 1``, and that is the whole rollback."""
        old = self.state
        accepted, tokens = verdict
        count = tokens.shape[1]
        steps = torch.arange(1, count + 1, device=self.device)
        # Rejected entries (-1) land beyond the new length; 0 keeps them valid ids.
        written = tokens.clamp(min=0)
        self._history.index_put_((old.slots[:, None], old.lengths[:, None] + steps), written)
        if count == 1:
            current, previous = written[:, 0], old.current
        else:
            at = accepted[:, None]
            current = written.gather(1, at)[:, 0]
            previous = torch.cat([old.current[:, None], written], 1).gather(1, at)[:, 0]
        self.state = StepState(
            old.slots,
            old.lengths + accepted + 1,
            current,
            previous,
            self._history,
            [n + k + 1 for n, k in zip(old.host_lengths, host_accepted, strict=True)],
            old.host_slots,
        )

    def remove_finished(self) -> list[ActiveSequence]:
        """Drop the rows of finished sequences and free their slots."""
        finished = [s for s in self.sequences if s.finish_reason is not None]
        if finished:
            keep = [row for row, s in enumerate(self.sequences) if s.finish_reason is None]
            self._keep(keep)
            self.free_slots = sorted(self.free_slots + [s.slot for s in finished])
        return finished

    def clear(self) -> list[int]:
        """Drop every row; returns the slots that were in use."""
        slots = list(self.state.host_slots)
        self._keep([])
        self.free_slots = sorted(self.free_slots + slots)
        return slots

    def _keep(self, rows: list[int]) -> None:
        old = self.state
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self.sequences = [self.sequences[row] for row in rows]
        self.state = StepState(
            old.slots[index],
            old.lengths[index],
            old.current[index],
            old.previous[index],
            self._history,
            [old.host_lengths[row] for row in rows],
            [old.host_slots[row] for row in rows],
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

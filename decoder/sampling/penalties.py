"""Bias, penalties and minimum lengths: what changes logits by what the row has said so far.

Under speculation the text before a position includes the drafts before it, so every position of a
verify pass has counts of its own. Tables over the vocabulary are made when a request needs them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from decoder.requests.params import SamplingParams

_LONGEST = 2**62  # tokens: no output is longer, and a position fits 64 bits


class Adjustments:
    """Per-row logit adjustments, applied in transformers' order.

    Order: logit bias, repetition penalty (prompt and output), presence and frequency penalties
    (output only), then no end before ``min_new_tokens``.

    Args:
        max_batch_size: rows of every table.
        vocab_size: V.
        device: of the tables.
    """

    def __init__(self, max_batch_size: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (max_batch_size, vocab_size)
        self._device = device
        # repetition, presence, frequency
        self._penalties = torch.zeros(max_batch_size, 3, device=device)
        self._penalties[:, 0] = 1.0
        self._output_counts: Tensor | None = None  # [max_batch_size, V] int32
        self._in_prompt: Tensor | None = None  # [max_batch_size, V] bool
        self._bias = _IdTable(max_batch_size, device)
        self._ending = _IdTable(max_batch_size, device)
        self._end_allowed_from = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self._penalised: set[int] = set()
        self._biased: set[int] = set()
        self._delayed: set[int] = set()

    def admit(
        self, row: int, params: SamplingParams, prompt_ids: Sequence[int], stop_ids: Iterable[int]
    ) -> None:
        """Start a request in ``row``; see ``Sampler.admit``."""
        self.release(row)
        p = params
        values = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        if values != (1.0, 0.0, 0.0):
            self._penalised.add(row)
            self._penalties[row] = torch.tensor(values, device=self._device)
            self._count_prompt(row, prompt_ids)
        if p.logit_bias:
            self._biased.add(row)
            self._bias.set(row, list(p.logit_bias), list(p.logit_bias.values()))
        ending = sorted(stop_ids)
        if p.min_new_tokens and ending:
            self._delayed.add(row)
            self._ending.set(row, ending, [float("-inf")] * len(ending))
            self._end_allowed_from[row] = len(prompt_ids) + min(p.min_new_tokens, _LONGEST)

    def release(self, row: int) -> None:
        """Back to neutral values, so that the next request of the row inherits nothing."""
        if row in self._penalised:
            self._penalties[row] = torch.tensor((1.0, 0.0, 0.0), device=self._device)
        if row in self._biased:
            self._bias.clear(row)
        if row in self._delayed:
            self._ending.clear(row)
        for members in (self._penalised, self._biased, self._delayed):
            members.discard(row)

    @property
    def active(self) -> bool:
        """Whether any admitted request changes logits."""
        return bool(self._penalised or self._biased or self._delayed)

    @property
    def plan(self) -> Hashable:
        """What is done, and where the tables are that it reads: they grow and are made late."""
        counts = self._output_counts if self._penalised else None
        return (
            0 if counts is None else counts.data_ptr(),
            self._bias.place if self._biased else None,
            self._ending.place if self._delayed else None,
        )

    def commit(self, rows: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Count emitted tokens: the first ``counts[b]`` of ``tokens`` ``[B, n]``."""
        if not self._penalised:
            return
        assert self._output_counts is not None
        column = torch.arange(tokens.shape[1], device=tokens.device)
        emitted = ((column < counts[:, None]) & (tokens >= 0)).to(torch.int32)
        index = rows[:, None].expand_as(tokens)
        self._output_counts.index_put_((index, tokens.clamp(min=0)), emitted, accumulate=True)

    def apply(
        self, logits: Tensor, rows: Tensor, positions: Tensor, prefix: Tensor | None
    ) -> Tensor:
        """Adjusted logits.

        Args:
            logits: ``[B, Q, V]`` floating; overwritten.
            rows: ``[B]`` int64.
            positions: ``[B, Q]`` int64, of the tokens to be chosen.
            prefix: ``[B, n]`` int64 drafted tokens not yet committed; the first ``n - Q + 1`` of
                them precede every position, each later one precedes one position less.
        """
        if self._biased:
            ids, bias = self._bias.select(rows)
            logits.scatter_add_(-1, _every(ids, logits), _every(bias, logits).to(logits.dtype))
        if self._penalised:
            logits = self._penalise(logits, rows, prefix)
        if self._delayed:
            ids, ban = self._ending.select(rows)
            early = positions < self._end_allowed_from[rows][:, None]  # [B, Q]
            # Unused table entries are a bias of 0, which leaves the logit as it is.
            ban = torch.where(early[..., None], ban[:, None], 0.0).to(logits.dtype)
            logits.scatter_add_(-1, _every(ids, logits), ban)
        return logits

    def _penalise(self, logits: Tensor, rows: Tensor, prefix: Tensor | None) -> Tensor:
        assert self._output_counts is not None and self._in_prompt is not None
        counts = self._output_counts[rows][:, None]  # [B, 1, V]
        if prefix is not None and prefix.shape[1]:
            counts = _with_prefix(counts, prefix, logits.shape[1])
        used = counts > 0
        values = self._penalties[rows].to(logits.dtype)
        repetition, presence, frequency = (values[:, i, None, None] for i in range(3))
        scaled = torch.where(logits < 0, logits * repetition, logits / repetition)
        logits = torch.where(used | self._in_prompt[rows][:, None], scaled, logits)
        return logits - (presence * used + frequency * counts)

    def _count_prompt(self, row: int, prompt_ids: Sequence[int]) -> None:
        if self._output_counts is None or self._in_prompt is None:
            self._output_counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._in_prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        self._output_counts[row] = 0
        self._in_prompt[row] = False
        self._in_prompt[row, torch.as_tensor(prompt_ids, device=self._device).long()] = True


class _IdTable:
    """A few (vocabulary id, value to add) pairs per row, padded with (0, 0.0)."""

    def __init__(self, max_batch_size: int, device: torch.device) -> None:
        self._ids = torch.zeros(max_batch_size, 1, dtype=torch.int64, device=device)
        self._values = torch.zeros(max_batch_size, 1, device=device)

    def set(self, row: int, ids: list[int], values: list[float]) -> None:
        missing = len(ids) - self._ids.shape[1]
        if missing > 0:
            self._ids = torch.nn.functional.pad(self._ids, (0, missing))
            self._values = torch.nn.functional.pad(self._values, (0, missing))
        self.clear(row)
        self._ids[row, : len(ids)] = torch.tensor(ids, device=self._ids.device)
        self._values[row, : len(ids)] = torch.tensor(values, device=self._ids.device)

    @property
    def place(self) -> tuple[int, int]:
        return self._ids.data_ptr(), self._ids.shape[1]

    def clear(self, row: int) -> None:
        self._ids[row] = 0
        self._values[row] = 0.0

    def select(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._ids[rows], self._values[rows]


def _every(values: Tensor, logits: Tensor) -> Tensor:
    """``[B, n]`` repeated for each of the Q positions of ``logits``."""
    return values[:, None].expand(-1, logits.shape[1], -1)


def _with_prefix(counts: Tensor, prefix: Tensor, Q: int) -> Tensor:
    """Counts ``[B, Q, V]`` from ``[B, 1, V]`` and the drafts ``[B, n]`` before each position."""
    counts = counts.repeat(1, Q, 1)
    shared = prefix.shape[1] - (Q - 1)
    for i in range(prefix.shape[1]):
        start = max(0, i - shared + 1)
        later = counts[:, start:]
        index = prefix[:, i, None, None].expand(-1, later.shape[1], 1)
        later.scatter_add_(-1, index, torch.ones_like(index, dtype=counts.dtype))
    return counts

"""Batched n-gram / prompt lookup: propose what followed the last time the context ended this way.

No model, no state: every row's own history is searched in one vectorised pass over ``[B, S]``, on
whatever device the tokens live. The proposal is a function of the context alone, so it is a
deterministic draft and needs no distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from decoder.round import Draft, StepState

from .base import Drafter, StatelessDrafter

if TYPE_CHECKING:
    from decoder.model.runner import ModelRunner
    from decoder.round import Verdict
    from decoder.sampling import Sampler


class Match(NamedTuple):
    """Where a row's context occurred before.

    Attributes:
        end: ``[B]`` int64, position of the last token of the earlier occurrence.
        length: ``[B]`` int64, matched tokens, capped at the longest n-gram; 0 without a match.
    """

    end: Tensor
    length: Tensor


def longest_recent_match(tokens: Tensor, lengths: Tensor, min_n: int, max_n: int) -> Match:
    """Find the longest earlier occurrence of each row's last ``n`` tokens, the latest on ties.

    Args:
        tokens: ``[B, S]`` int64; row ``b`` is valid up to and including position ``lengths[b]``.
        lengths: ``[B]`` int64 position of the last token.
        min_n: shortest suffix that counts as a match.
        max_n: longest suffix compared.
    """
    S = tokens.shape[1]
    column = torch.arange(S, device=tokens.device)
    last = tokens.gather(1, lengths[:, None])  # [B, 1]
    alive = (tokens == last) & (column < lengths[:, None])  # [B, S], match ends at this column
    run = alive.to(torch.int64)
    for back in range(1, min(max_n, S)):
        suffix = tokens.gather(1, (lengths - back).clamp(min=0)[:, None])
        alive[:, back:] &= tokens[:, :-back] == suffix
        alive[:, :back].fill_(False)
        run += alive
    # One number orders by length first and recency second.
    score, end = torch.where(run >= min_n, run * S + column, -1).max(dim=1)
    return Match(end, torch.where(score >= 0, score.clamp(min=0) // S, 0))


def continue_from(tokens: Tensor, lengths: Tensor, end: Tensor, gamma: int) -> Tensor:
    """Copy the ``gamma`` tokens after ``end``, running on into the copy itself as LZ77 does.

    A match that ends ``d`` tokens back has only ``d`` tokens after it; reading on cyclically turns
    repeated text (``d`` smaller than ``gamma``) into a full-length draft.
    """
    distance = (lengths - end).clamp(min=1)[:, None]
    step = torch.arange(gamma, device=tokens.device)
    # The minimum only matters for a row of one token, which has nothing to copy.
    return tokens.gather(1, torch.minimum(end[:, None] + 1 + step % distance, lengths[:, None]))


class NgramDrafter(StatelessDrafter):
    """Prompt lookup over the row's own prompt and output.

    Args:
        max_ngram: longest context suffix looked up.
        min_ngram: shortest; rows matching less propose nothing (``lengths`` 0).
    """

    name = "ngram"

    def __init__(self, max_ngram: int = 4, min_ngram: int = 2) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(
                f"n-gram sizes must satisfy 1 <= min <= max, got min {min_ngram}, max {max_ngram}"
            )
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self._runner: ModelRunner | None = None

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        self._runner = runner

    def match(self, state: StepState, gamma: int) -> tuple[Tensor, Tensor]:
        """Proposed tokens ``[B, gamma]`` and match length ``[B]`` (0: nothing to propose)."""
        width = max(state.host_lengths) + 1
        runner = self._runner
        graphs = runner.graphs if runner is not None and runner.static else None
        if graphs is None:
            return self._match(state.tokens[:, :width], gamma, state.rows, state.lengths)
        history = state.tokens[:, : graphs.view(width)]
        run = partial(self._match, history, gamma)
        key = self.name, history.data_ptr(), history.shape[1], gamma
        copied, matched = graphs.call(key, run, [state.rows, state.lengths], [graphs.spare_row, 0])
        return copied, matched

    def _match(
        self, history: Tensor, gamma: int, rows: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``match`` in ``history [max_batch_size + 1, S]``, with none in a row of one token."""
        own = history.index_select(0, rows)
        match = longest_recent_match(own, lengths, self.min_ngram, self.max_ngram)
        end = torch.where(match.length > 0, match.end, lengths - 1).clamp(min=0)
        return continue_from(own, lengths, end, gamma), match.length

    def propose(self, state: StepState, gamma: int) -> Draft:
        tokens, matched = self.match(state, gamma)
        return Draft(tokens, None, (matched > 0) * gamma)


class HybridDrafter:
    """A model drafter, overridden row by row where the context repeats for long enough.

    Which of the two speaks depends on the context only, so the output law is untouched. The model
    runs for every row either way: the override buys acceptance, not draft time.

    Args:
        model: the neural drafter.
        ngram: the lookup; its ``max_ngram`` must reach ``threshold``.
        threshold: matched tokens from which the lookup is trusted over the model.
    """

    def __init__(
        self, model: Drafter, ngram: NgramDrafter | None = None, threshold: int = 4
    ) -> None:
        self.model = model
        self.ngram = ngram or NgramDrafter(max_ngram=threshold, min_ngram=threshold)
        if self.ngram.max_ngram < threshold:
            raise ValueError(
                f"threshold {threshold} can never be reached with max_ngram {self.ngram.max_ngram}"
            )
        self.threshold = threshold
        self.name = f"{model.name}+ngram"

    @property
    def hidden_layers(self) -> tuple[int, ...] | None:
        return self.model.hidden_layers

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        self.model.bind(runner, sampler, max_gamma)
        self.ngram.bind(runner, sampler, max_gamma)

    def admit(
        self, rows: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        self.model.admit(rows, token_ids, lengths, hidden)

    def propose(self, state: StepState, gamma: int) -> Draft:
        drafted = self.model.propose(state, gamma)
        gamma = drafted.gamma  # fewer where no row has room for more
        copied, matched = self.ngram.match(state, gamma)
        override = matched >= self.threshold  # [B]
        # The model's cache now holds drafts that may not be the ones verified.
        forget = getattr(self.model, "forget_drafts", None)
        if forget is not None:
            forget(state)
        probs = drafted.probs
        if probs is not None:
            one_hot = torch.zeros_like(probs).scatter_(2, copied[..., None], 1.0)
            probs = torch.where(override[:, None, None], one_hot, probs)
        return Draft(
            torch.where(override[:, None], copied, drafted.tokens),
            probs,
            torch.where(override, gamma, drafted.lengths),
        )

    def commit(self, state_before: StepState, verdict: Verdict, hidden: Tensor | None) -> None:
        self.model.commit(state_before, verdict, hidden)

    def release(self, rows: Sequence[int]) -> None:
        self.model.release(rows)

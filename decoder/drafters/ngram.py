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
from decoder.sampling.distribution import one_hot_where

from .base import Drafter, StatelessDrafter, graphs_of
from .chain import shared_probs

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
        graphs, run = graphs_of(self._runner), self.lookup
        history, width = state.tokens, max(state.host_lengths) + 1
        if graphs is None:
            return run(history, width, gamma, state.rows, state.lengths)
        width = graphs.view(width)
        key = self.name, history.data_ptr(), width, gamma
        inputs, padding = [state.rows, state.lengths], [graphs.spare_row, 0]
        copied, matched = graphs.call(key, partial(run, history, width, gamma), inputs, padding)
        return copied, matched

    def lookup(
        self, history: Tensor, width: int, gamma: int, rows: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``match`` in ``history [max_batch_size + 1, S]`` before position ``width``.

        On tensors alone, so that a graph may hold it; a row of one token has no match.
        """
        own = history[:, :width].index_select(0, rows)
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
        self._runner: ModelRunner | None = None
        self._sampler: Sampler | None = None
        self.name = f"{model.name}+ngram"

    @property
    def hidden_layers(self) -> tuple[int, ...] | None:
        return self.model.hidden_layers

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        self._runner, self._sampler = runner, sampler
        self.model.bind(runner, sampler, max_gamma)
        self.ngram.bind(runner, sampler, max_gamma)

    def admit(
        self, rows: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        self.model.admit(rows, token_ids, lengths, hidden)

    @torch.inference_mode()
    def propose(self, state: StepState, gamma: int) -> Draft:
        drafted = self.model.propose(state, gamma)
        # The model's cache now holds drafts that may not be the ones verified.
        forget = getattr(self.model, "forget_drafts", None)
        if forget is not None:
            forget(state)
        inputs = [state.rows, state.lengths, drafted.tokens, drafted.lengths]
        graphs, probs = graphs_of(self._runner), drafted.probs
        history, width = state.tokens, max(state.host_lengths) + 1
        if graphs is None:
            tokens, lengths = self._override(history, width, probs, *inputs)
            return Draft(tokens, probs, lengths)
        width, place = graphs.view(width), None
        if probs is not None:
            assert self._sampler is not None
            probs = shared_probs(self._sampler, probs, graphs.bucket(len(state.host_rows)))
            place = probs.data_ptr(), probs.dtype
        run = partial(self._override, history, width, probs)
        key = self.name, history.data_ptr(), width, place
        tokens, lengths = graphs.call(key, run, inputs, [graphs.spare_row, 0, 0, 0])
        return Draft(tokens, None if probs is None else probs[: len(tokens)], lengths)

    def _override(
        self,
        history: Tensor,
        width: int,
        probs: Tensor | None,
        rows: Tensor,
        lengths: Tensor,
        drafted: Tensor,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and their number in a draft of ``drafted [B, G]``, whose ``probs`` are changed."""
        gamma = drafted.shape[1]  # fewer than asked for where no row has room for more
        copied, matched = self.ngram.lookup(history, width, gamma, rows, lengths)
        override = matched >= self.threshold  # [B]
        if probs is not None:
            one_hot_where(override, copied, probs)
        tokens = torch.where(override[:, None], copied, drafted)
        return tokens, torch.where(override, gamma, counts)

    def commit(self, state_before: StepState, verdict: Verdict, hidden: Tensor | None) -> None:
        self.model.commit(state_before, verdict, hidden)

    def release(self, rows: Sequence[int]) -> None:
        self.model.release(rows)

"""N-gram lookup in everything that a decoder has read and written.

Each row looks for its last tokens, as many as possible, in its own text and in those of other
sequences, live and finished, and proposes what followed most often: the longer the match, the more
of it. A proposal is a function of texts alone, so it needs no distribution.

A row looks beyond its own text only where no draft can change its output: when it decodes greedily,
or is verified coupled. Under rejection sampling its output would depend on what else was decoded
and, where another request had the same seed and thus the same noise, would not even be lossless.

Source: Oliaro et al. 2025 (2411.04975), with hash chains in the place of suffix trees and one path
in the place of a tree of drafts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decoder.round import Draft, StepState

from .continuation import likeliest, longest
from .index import SuffixIndex

if TYPE_CHECKING:
    from decoder.model.runner import ModelRunner
    from decoder.round import Verdict
    from decoder.sampling import Sampler

MAX_CACHED_TOKENS = 1 << 20  # of finished sequences; 20 bytes each
_SHARED_TABLE, _OWN_TABLE = 1 << 18, 1 << 13


class _Row:
    """A live sequence: its own text, and its number among those that all rows look in."""

    def __init__(self, shared: SuffixIndex) -> None:
        self.own, self.number = SuffixIndex(_OWN_TABLE), shared.open()
        self.own.open()
        self.tokens = self.own.tokens(0)


class SuffixDrafter:
    """Lookup of a row's longest suffix over all sequences of a decoder.

    Args:
        max_tree_depth: longest suffix that is compared.
        max_cached_requests: finished sequences that are looked in, the last; 0 keeps every row to
            its own text.
        max_spec_factor: longest proposal, as a multiple of the suffix found.
        min_token_prob: a proposal ends before its share of what followed falls below this.
        max_cached_tokens: of the finished sequences together.

    Raises:
        ValueError: a number out of range.
    """

    name = "suffix"
    hidden_layers: tuple[int, ...] | None = None

    def __init__(
        self,
        max_tree_depth: int = 24,
        max_cached_requests: int = 10_000,
        max_spec_factor: float = 1.0,
        min_token_prob: float = 0.1,
        *,
        max_cached_tokens: int = MAX_CACHED_TOKENS,
    ) -> None:
        for what, value, low, high in (
            ("max_tree_depth", max_tree_depth, 1, math.inf),
            ("max_cached_requests", max_cached_requests, 0, math.inf),
            ("max_spec_factor", max_spec_factor, 0, math.inf),
            ("min_token_prob", min_token_prob, 0, 1),
            ("max_cached_tokens", max_cached_tokens, 0, math.inf),
        ):
            if not low <= value <= high:
                raise ValueError(f"{what} must be in [{low}, {high}], got {value}")
        self.max_tree_depth = max_tree_depth
        self.max_cached_requests = max_cached_requests
        self.max_spec_factor = max_spec_factor
        self.min_token_prob = min_token_prob
        self.max_cached_tokens = max_cached_tokens

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        self._sampler = sampler
        self._rows: dict[int, _Row] = {}
        self._shared = SuffixIndex(_SHARED_TABLE, self.max_cached_tokens, self.max_cached_requests)

    def admit(
        self, rows: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        prompts = zip(rows.tolist(), token_ids.tolist(), lengths.tolist(), strict=True)
        for row, tokens, length in prompts:
            self._start(row, tokens[:length])

    def propose(self, state: StepState, gamma: int) -> Draft:
        for row, length in state.rows_and_lengths():
            if row not in self._rows or len(self._rows[row].tokens) > length + 1:
                self._start(row, [])
            self._read(state, row, length)
        found = [(row, self._path(row, gamma)) for row in state.host_rows]
        packed = torch.tensor(
            [
                [*path, *self._rows[row].tokens[-1:] * (gamma - len(path)), len(path)]
                for row, path in found
            ],
            device=state.rows.device,
        )
        return Draft(packed[:, :gamma], None, packed[:, gamma])

    def commit(self, state_before: StepState, verdict: Verdict, hidden: Tensor | None) -> None:
        emitted = verdict.host_tokens or verdict.tokens.tolist()
        for (row, length), tokens in zip(state_before.rows_and_lengths(), emitted, strict=True):
            self._read(state_before, row, length)
            self._extend(row, length + 1, [token for token in tokens if token >= 0])

    def release(self, rows: Sequence[int]) -> None:
        for row in rows:
            live = self._rows.pop(row, None)
            if live is not None:
                self._shared.close(live.number)

    def forget_finished(self) -> None:
        """Look in live sequences only, from now on."""
        self._shared.forget_closed()

    def _read(self, state: StepState, row: int, length: int) -> None:
        """What ``row`` lacks up to ``current``: the first token, or where a call has failed."""
        live = self._rows.get(row)
        if live is not None and (known := len(live.tokens)) <= length:
            self._extend(row, known, state.tokens[row, known : length + 1].tolist())

    def _start(self, row: int, tokens: list[int]) -> None:
        self.release([row])
        self._rows[row] = _Row(self._shared)
        self._extend(row, 0, tokens)

    def _extend(self, row: int, start: int, tokens: list[int]) -> None:
        """Take in what of ``tokens``, which begin at position ``start``, the row does not have."""
        live = self._rows.get(row)
        if live is not None and start <= len(live.tokens):
            new = tokens[len(live.tokens) - start :]
            self._shared.extend(live.number, new)
            live.own.extend(0, new)

    def _path(self, row: int, gamma: int) -> list[int]:
        """What the row proposes, at most ``gamma`` tokens."""
        live = self._rows[row]
        recent = live.tokens[-self.max_tree_depth :]
        places = live.own.find(recent)
        if self.max_cached_requests and self._no_draft_matters(row):
            places += self._shared.find(recent, besides=live.number)
        matched, places = longest(places, recent)
        count = int(min(gamma, self.max_spec_factor * matched))
        return likeliest(places, live.tokens, count, self.min_token_prob)

    def _no_draft_matters(self, row: int) -> bool:
        """Whether the row's output is the same whatever is drafted."""
        return self._sampler.verifier == "coupled" or self._sampler.all_greedy([row])

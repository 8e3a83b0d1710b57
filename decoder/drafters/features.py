"""Drafting with heads that read the target's features and extend them by themselves.

Each round the accepted tokens run through the heads once more, now beside the target's true
features, which replaces the keys and values computed from guesses; the last head then goes on with
its own output. True features arrive with every verify forward and wait in a ring per row until the
heads need them, so rounds at gamma 0 cost nothing but the copy.

Heads take turns: at a position t, whose feature is the first one's input, head k reads its
predecessor's output there beside token t + 1 + k, and predicts token t + 2 + k. A head's output at
t stands for what it would be given at t + 1, which is how the last, and an only one, goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decoder.errors import UserError
from decoder.model.attention import Placement, placed
from decoder.model.cache import RaggedCache
from decoder.round import Draft, StepState

from .base import empty_draft, usable_length, within
from .chain import Chains, DraftChain, Reach, Texts
from .heads.base import Head
from .vocab import fit_vocab

if TYPE_CHECKING:
    from decoder.model.graphs import StepGraphs
    from decoder.model.kernels import RaggedOp
    from decoder.model.runner import ModelRunner
    from decoder.round import Verdict
    from decoder.sampling import Sampler

_PREFILL_CHUNK = 256


class FeatureDrafter:
    """What drafters with heads have in common; a subclass attaches the heads.

    Attributes:
        name: see ``Drafter``.
        hidden_layers: see ``Drafter``.
        what: its kind of head, for messages.
    """

    name: str
    what: str
    hidden_layers: tuple[int, ...] | None

    def _attach(
        self,
        runner: ModelRunner,
        sampler: Sampler,
        max_gamma: int,
        heads: Sequence[Head],
        *,
        width: int,
        positions: int,
        attention: RaggedOp | None,
        capturable: bool,
    ) -> None:
        """Make room for the rows.

        Args:
            runner, sampler, max_gamma: of ``bind``.
            heads: in the order of their turns.
            width: of a position's features.
            positions: that the heads know.
            attention: the kernel that reads their caches, if there is one.
            capturable: whether a graph may hold what the heads do.
        """
        self._runner, self._sampler, self._heads = runner, sampler, tuple(heads)
        self._attention = attention
        self._limit = usable_length(self.what, positions, runner.max_length)
        self._chains = Chains(runner, sampler, self._limit)
        self._capturable = runner.static and capturable
        # As the target's cache: graphs want it where it is.
        whole = self._limit if runner.static else None
        self.caches = [RaggedCache(runner.max_batch_size, self._limit, whole) for _ in heads]
        rows = runner.max_batch_size + 1  # the last is that of padding in graphs
        # A later head has read drafts at the last positions before the text went on.
        self._guessed = len(self._heads) - 1
        # Twice the longest round: the backlog of gamma-0 rounds is flushed before it wraps.
        self._ring_size = max(16, 2 * (max_gamma + 1)) + self._guessed
        self._ring = torch.zeros(
            rows, self._ring_size, width, dtype=runner.dtype, device=runner.device
        )
        # Below `synced`, head k has keys and values of true features and tokens up to the k last.
        self._synced = torch.zeros(rows, dtype=torch.int64, device=runner.device)
        self._host_synced = [0] * runner.max_batch_size
        self._refreshed = False  # whether this round's draft has brought all rows up to date

    @torch.inference_mode()
    def admit(
        self, rows: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        """Pairs ``(token_{t+1}, feature_t)`` inside the prompt; the last features have to wait."""
        features = self._present(hidden)
        width = token_ids.shape[1]
        for start in range(0, width - 1, _PREFILL_CHUNK):
            self._prefill(rows, token_ids, lengths, features, start)
        ring = lengths[:, None] - 1 - torch.arange(self._guessed + 1, device=rows.device)
        index = torch.arange(rows.numel(), device=rows.device)[:, None]
        ring = ring.clamp(min=0)  # a short prompt's first feature more than once
        self._ring[rows[:, None], ring % self._ring_size] = features[index, ring]
        self._synced[rows] = lengths - 1
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            self._host_synced[row] = length - 1

    def _prefill(
        self, rows: Tensor, token_ids: Tensor, lengths: Tensor, features: Tensor, start: int
    ) -> None:
        """A chunk of the prompts through every head."""
        stop = min(start + _PREFILL_CHUNK, token_ids.shape[1] - 1)
        column = torch.arange(start, stop, device=rows.device)
        length = min(stop, self._limit)
        hidden = self._heads[0].fuse(features[:, start:stop])
        for turn, cache in enumerate(self.caches):
            following = column + 1 + turn
            tokens = token_ids[:, following.clamp(max=token_ids.shape[1] - 1)]
            positions = torch.where(following < lengths[:, None], column, -1)
            cache.reserve(length)
            shown = within(positions, self._limit, stop - 1)
            hidden = self._forward(turn, tokens, hidden, rows, shown, length)

    @torch.inference_mode()
    def propose(self, state: StepState, gamma: int) -> Draft:
        self._refreshed = False
        longest = self._chains.longest(state, gamma)
        if not longest:
            return empty_draft(state, gamma)
        gamma, graphs, W = longest, self._graphs, self._behind(state, 0)
        if graphs is not None:
            W = 1 << (W - 1).bit_length()  # what is not behind is padding, and each W a graph
        self._reserve(max(state.host_lengths) + gamma - 1)
        steps = partial(self._steps, gamma, W, state.tokens)
        key = self.name, W, state.tokens.data_ptr()
        draft = self._chains.draft(graphs, key, steps, state, gamma)
        self._refreshed = True
        return draft

    def _steps(
        self,
        gamma: int,
        W: int,
        history: Tensor,
        reach: Reach,
        rows: Tensor,
        lengths: Tensor,
        current: Tensor,
        previous: Tensor,
    ) -> DraftChain:
        chain = DraftChain(self._sampler, rows, lengths, gamma)
        self._draft(chain, gamma, W, Texts(reach, history, rows, lengths))
        return chain

    def _draft(self, chain: DraftChain, gamma: int, W: int, texts: Texts) -> None:
        """Bring the last ``W`` positions up to date and draw ``gamma`` tokens after them."""
        hidden, last = self._waiting(W, texts), self._guessed
        for step in range(max(gamma, last + 1)):
            if step <= last:
                hidden = self._refresh(step, hidden, texts, chain.drawn)
            else:
                ahead = step - last - 1
                positions = texts.reach.place(texts.lengths[:, None] + ahead, ahead)
                token, length = chain.drawn[:, -1:], texts.reach.length(ahead)
                hidden = self._forward(last, token, hidden[:, -1:], texts.rows, positions, length)
            if step < gamma:  # [B, 1, H], the prediction for `lengths + 1 + step`
                chain.draw(self._logits(min(step, last), hidden[:, -1:]))

    @torch.inference_mode()
    def commit(self, state_before: StepState, verdict: Verdict, hidden: Tensor | None) -> None:
        """Store the verify forward's features; those of rejected tokens are overwritten unread."""
        features = self._present(hidden)
        Q = features.shape[1]
        # Only now: a round that failed on the way is drafted again from where it was.
        refreshed = self._refreshed
        behind = Q + self._guessed if refreshed else self._behind(state_before, Q)
        if behind > self._ring_size:
            self._catch_up(state_before)
            refreshed = True
        store = partial(self._store, refreshed)
        inputs, graphs = [state_before.rows, state_before.lengths, features], self._graphs
        if graphs is None:
            store(*inputs)
        else:
            padding = [graphs.spare_row, 0, 0]
            graphs.call((self.name, "commit", refreshed), store, inputs, padding)
        if refreshed:
            for row, length in state_before.rows_and_lengths():
                self._host_synced[row] = length
        self._refreshed = False

    def _store(
        self, refreshed: bool, rows: Tensor, lengths: Tensor, features: Tensor
    ) -> list[Tensor]:
        """Features ``[B, Q, n * H]`` of the positions from ``lengths`` on, into the ring."""
        if refreshed:
            self._synced[rows] = lengths
        positions = lengths[:, None] + torch.arange(features.shape[1], device=features.device)
        self._ring[rows[:, None], positions % self._ring_size] = features
        return []

    def release(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._host_synced[int(row)] = 0

    @property
    def _graphs(self) -> StepGraphs | None:
        """The target's, for the heads use its weights."""
        return self._runner.graphs if self._capturable else None

    def _behind(self, state: StepState, more: int) -> int:
        """Positions to run, ``more`` from here, for the row which is furthest behind."""
        return self._guessed + max(
            length + more - self._host_synced[row] for row, length in state.rows_and_lengths()
        )

    def _reserve(self, length: int) -> None:
        for cache in self.caches:
            cache.reserve(min(length, self._limit))

    def _catch_up(self, state: StepState) -> None:
        """Make room in the ring, which rounds without drafts have filled."""
        longest = max(state.host_lengths)
        self._reserve(longest)
        texts = Texts(Reach(self._limit, longest), state.tokens, state.rows, state.lengths)
        hidden = self._waiting(self._behind(state, 0), texts)
        for turn in range(len(self._heads)):
            hidden = self._refresh(turn, hidden, texts, state.current[:, None][:, :0])

    def _waiting(self, W: int, texts: Texts) -> Tensor:
        """The first head's input of the last ``W`` positions with features, ``[B, W, H]``."""
        positions = texts.lengths[:, None] - W + torch.arange(W, device=texts.rows.device)
        return self._heads[0].fuse(self._ring[texts.rows[:, None], positions % self._ring_size])

    def _window(self, turn: int, W: int, texts: Texts, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and positions ``[B, W]`` of a turn, right-aligned: the last is ``lengths - 1``.

        ``drafted [B, n]`` follows the text. Padding is what was brought up to date in an earlier
        round, and what stands before a token that there is not yet.
        """
        reach, history, rows, lengths = texts
        positions = lengths[:, None] - W + torch.arange(W, device=rows.device)
        places = (positions + 1 + turn).clamp(min=0, max=history.shape[1] - 1)
        tokens, known = history[rows[:, None], places], self._synced[rows][:, None]
        if self._guessed:
            known = (known - self._guessed).clamp(min=0)
        live = torch.where(positions >= known, positions, -1)
        if turn:
            count = drafted.shape[1]
            tokens[:, W - turn : W - turn + count] = drafted[:, :turn]
            live[:, W - max(turn - count, 0) :].fill_(-1)
        return tokens, reach.place(live, -1)

    def _refresh(self, turn: int, hidden: Tensor, texts: Texts, drafted: Tensor) -> Tensor:
        """Run a head where true features or tokens have arrived since last time; ``[B, W, H]``."""
        tokens, positions = self._window(turn, hidden.shape[1], texts, drafted)
        length = texts.reach.length(-1)
        return self._forward(turn, tokens, hidden, texts.rows, positions, length)

    def _forward(
        self,
        turn: int,
        tokens: Tensor,
        hidden: Tensor,
        rows: Tensor,
        positions: Tensor,
        length: int,
    ) -> Tensor:
        """One pass of a head; no position reaches ``length``."""
        cache = self.caches[turn]
        if self._capturable:  # of padding in a graph, which no cache row is meant for
            rows = rows.clamp(max=cache.num_rows - 1)
        cache.select(rows, positions)
        placement = Placement(rows, positions, length, self._attention)
        with placed(placement):
            return self._heads[turn](tokens, hidden, cache, placement)

    def _logits(self, turn: int, hidden: Tensor) -> Tensor:
        vocab_size = self._sampler.vocab_size
        return fit_vocab(self._heads[turn].logits(hidden, vocab_size), vocab_size)

    def _present(self, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            raise UserError(f"the {self.what} needs the target's hidden states, got None")
        return hidden

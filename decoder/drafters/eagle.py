"""EAGLE drafting: a small head that reads the target's features and extends them by itself.

Each round the accepted tokens run through the head once more, now beside the target's true
features, which replaces the keys and values it had computed from its own guesses; then it takes
``gamma - 1`` steps on its own output. True features arrive with every verify forward and wait in a
ring per row until the head needs them, so rounds at gamma 0 cost it nothing but the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from decoder.errors import UserError
from decoder.model.attention import Placement, placed
from decoder.model.cache import RaggedCache
from decoder.model.kernels import accelerate, ragged_attention_op
from decoder.model.rope import looks_at_positions
from decoder.round import Draft, StepState

from .base import empty_draft, usable_length, within
from .chain import Chains, DraftChain, Reach
from .eagle_config import EagleCheckpoint
from .eagle_head import EagleHead
from .eagle_loader import load_eagle

if TYPE_CHECKING:
    from decoder.model.graphs import StepGraphs
    from decoder.model.runner import ModelRunner
    from decoder.round import Verdict
    from decoder.sampling import Sampler

_PREFILL_CHUNK = 256


class EagleDrafter:
    """Chain drafting with an EAGLE-1 or EAGLE-3 head.

    Args:
        checkpoint: a loaded head or the directory of one.
        kernels: let ``moesd_kernels`` run the head's linear layers and norms.
    """

    def __init__(self, checkpoint: EagleCheckpoint | str | Path, *, kernels: bool = False) -> None:
        if not isinstance(checkpoint, EagleCheckpoint):
            checkpoint = load_eagle(checkpoint)
        self.checkpoint = checkpoint
        self._kernels = kernels
        self.name: str = checkpoint.config.kind
        self.hidden_layers: tuple[int, ...] | None = checkpoint.config.feature_layers

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        model = runner.model
        depth = model.config.get_text_config().num_hidden_layers
        self.hidden_layers = self.hidden_layers or (2, depth // 2, depth - 3)
        if any(not -depth - 1 <= layer <= depth for layer in self.hidden_layers):
            raise UserError(
                f"the EAGLE head reads hidden states {self.hidden_layers} of a target with "
                f"{depth} layers"
            )
        embedding = model.get_input_embeddings().weight
        self.head = EagleHead(self.checkpoint, embedding, model.get_output_embeddings()).eval()
        if self._kernels:
            accelerate(self.head)
        width = len(self.hidden_layers) * model.config.get_text_config().hidden_size
        if self.head.feature_size != width:
            raise UserError(
                f"the EAGLE head expects features of width {self.head.feature_size}, the target's "
                f"hidden states {self.hidden_layers} make {width}"
            )
        mapping = self.checkpoint.draft_to_target
        if mapping is not None and int(mapping.max()) >= sampler.vocab_size:
            raise UserError(
                f"the EAGLE head's d2t reaches token {int(mapping.max())}, the target has "
                f"{sampler.vocab_size}"
            )
        self._sampler = sampler
        self._attention = ragged_attention_op(embedding.device, embedding.dtype)
        own = self.checkpoint.config.rope.get("max_position_embeddings", runner.max_length)
        self._limit = usable_length("EAGLE head", own, runner.max_length)
        self._chains = Chains(runner, sampler, self._limit)
        self._runner = runner
        self._capturable = runner.static and not looks_at_positions(self.head)
        # As the target's cache: graphs want it where it is.
        whole = self._limit if runner.static else None
        self.cache = RaggedCache(runner.max_batch_size, self._limit, whole)
        rows = runner.max_batch_size + 1  # the last is that of padding in graphs
        # Twice the longest round: the backlog of gamma-0 rounds is flushed before it wraps.
        self._ring_size = max(16, 2 * (max_gamma + 1))
        self._ring = embedding.new_zeros(rows, self._ring_size, width)
        # Positions below `synced` have keys and values computed from true features.
        self._synced = torch.zeros(rows, dtype=torch.int64, device=embedding.device)
        self._host_synced = [0] * runner.max_batch_size
        self._refreshed = False  # whether this round's draft has brought all rows up to date

    @torch.inference_mode()
    def admit(
        self, rows: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        """Pairs ``(token_{t+1}, feature_t)`` inside the prompt; the last feature has to wait."""
        features = _present(hidden)
        width = token_ids.shape[1]
        column = torch.arange(width, device=rows.device)
        positions = torch.where(column < lengths[:, None] - 1, column, -1)[:, :-1]
        for start in range(0, width - 1, _PREFILL_CHUNK):
            chunk = slice(start, min(start + _PREFILL_CHUNK, width - 1))
            following = token_ids[:, chunk.start + 1 : chunk.stop + 1]
            fused = self.head.fuse(features[:, chunk])
            shown = within(positions[:, chunk], self._limit, chunk.stop - 1)
            length = min(chunk.stop, self._limit)
            self.cache.reserve(length)
            self._forward(following, fused, rows, shown, length)
        last = lengths - 1
        index = torch.arange(rows.numel(), device=rows.device)
        self._ring[rows, last % self._ring_size] = features[index, last]
        self._synced[rows] = last
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            self._host_synced[row] = length - 1

    @torch.inference_mode()
    def propose(self, state: StepState, gamma: int) -> Draft:
        self._refreshed = False
        longest = self._chains.longest(state, gamma)
        if not longest:
            return empty_draft(state, gamma)
        gamma, graphs, W = longest, self._graphs, self._behind(state, 0)
        if graphs is not None:
            W = 1 << (W - 1).bit_length()  # what is not behind is padding, and each W a graph
        self.cache.reserve(min(max(state.host_lengths) + gamma - 1, self._limit))
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
        hidden = self._refresh(W, reach, history, rows, lengths)
        hidden = hidden[:, -1:]  # [B, 1, H], the prediction for `lengths`
        chain = DraftChain(self._sampler, rows, lengths, gamma)
        for step in range(gamma):
            token = chain.draw(self.head.logits(hidden, self._sampler.vocab_size))
            if step + 1 < gamma:
                positions = reach.place(lengths[:, None] + step, step)
                hidden = self._forward(token, hidden, rows, positions, reach.length(step))
        return chain

    @torch.inference_mode()
    def commit(self, state_before: StepState, verdict: Verdict, hidden: Tensor | None) -> None:
        """Store the verify forward's features; those of rejected tokens are overwritten unread."""
        features = _present(hidden)
        Q = features.shape[1]
        # Only now: a round that failed on the way is drafted again from where it was.
        refreshed = self._refreshed
        behind = Q if refreshed else self._behind(state_before, Q)
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
        """The target's, for the head uses its weights."""
        return self._runner.graphs if self._capturable else None

    def _behind(self, state: StepState, more: int) -> int:
        """Pairs that the row which is furthest behind lacks at ``more`` positions from here."""
        return max(
            length + more - self._host_synced[row] for row, length in state.rows_and_lengths()
        )

    def _catch_up(self, state: StepState) -> None:
        """Make room in the ring, which rounds without drafts have filled."""
        longest = max(state.host_lengths)
        self.cache.reserve(min(longest, self._limit))
        reach = Reach(self._limit, longest)
        self._refresh(self._behind(state, 0), reach, state.tokens, state.rows, state.lengths)

    def _refresh(
        self, W: int, reach: Reach, history: Tensor, rows: Tensor, lengths: Tensor
    ) -> Tensor:
        """Run the pairs whose true features have arrived since last time; ``[B, W, H]``.

        Right-aligned, so the last column is position ``lengths - 1`` of every row.
        """
        positions = lengths[:, None] - W + torch.arange(W, device=rows.device)
        places = (positions + 1).clamp(min=0, max=history.shape[1] - 1)
        tokens = history[rows[:, None], places]
        fused = self.head.fuse(self._ring[rows[:, None], positions % self._ring_size])
        live = torch.where(positions >= self._synced[rows][:, None], positions, -1)
        return self._forward(tokens, fused, rows, reach.place(live, -1), reach.length(-1))

    def _forward(
        self, tokens: Tensor, hidden: Tensor, rows: Tensor, positions: Tensor, length: int
    ) -> Tensor:
        """One head pass; no position reaches ``length``."""
        if self._capturable:  # of padding in a graph, which no cache row is meant for
            rows = rows.clamp(max=self.cache.num_rows - 1)
        self.cache.select(rows, positions)
        placement = Placement(rows, positions, length, self._attention)
        with placed(placement):
            return self.head(tokens, hidden, self.cache, placement)


def _present(hidden: Tensor | None) -> Tensor:
    if hidden is None:
        raise UserError("the EAGLE drafter needs the target's hidden states, got None")
    return hidden

"""An independent draft model with a ragged cache of its own.

Every round starts by feeding the last two tokens, not one: after a round in which all drafts were
accepted the draft model has never seen its own last proposal, and rewriting the position before it
otherwise is harmless. The shape is the same either way, so there is no branch and no sync. A model
with recurrent state has not settled that position either.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from decoder.model import kernels
from decoder.model.loading import context_length
from decoder.round import Draft, StepState

from .base import empty_draft, usable_length
from .chain import Chains, DraftChain, Reach
from .vocab import fit_vocab, require_same_vocabulary

if TYPE_CHECKING:
    from decoder.model.runner import ModelRunner
    from decoder.round import Verdict
    from decoder.sampling import Sampler

_INLINE_LAG = 8  # missing tokens fed along with the first step instead of before it
_CHUNK = 256  # positions per catch-up forward


class IndependentDrafter:
    """Chain drafting with a smaller language model.

    Args:
        model: a transformers causal LM in evaluation mode.
        tokenizer: of the draft model, to compare vocabularies; optional when sizes are equal.
        target_tokenizer: of the target.
        hasten: let our kernels run the model, in other numbers where those are sooner multiplied;
            for a model that nobody else has.
    """

    name = "independent"
    hidden_layers: tuple[int, ...] | None = None

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        target_tokenizer: Any | None = None,
        hasten: bool = False,
    ) -> None:
        self.model = model
        self._hasten = hasten
        self._tokenizers = (target_tokenizer, tokenizer)

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        from decoder.model.runner import ModelRunner

        draft_size = self.model.get_output_embeddings().weight.shape[0]
        require_same_vocabulary(sampler.vocab_size, draft_size, *self._tokenizers)
        if self._hasten:
            kernels.accelerate(kernels.hastened(self.model, runner.max_batch_size))
        self._limit = usable_length("draft model", context_length(self.model), runner.max_length)
        self.runner = ModelRunner(
            self.model,
            runner.max_batch_size,
            self._limit,
            static=runner.asked_static,
            longest_draft=max_gamma,
        )
        # A recurrent state takes in what it is fed once and no more.
        self._stateful = self.runner.cache.recurrent is not None
        self._sampler = sampler
        self._chains = Chains(self.runner, sampler, self._limit)
        self._last_id = draft_size - 1
        self._same_ids = draft_size == sampler.vocab_size
        # Rows below it hold keys and values of committed tokens, or of drafts that the next
        # state will show to have been committed.
        self._synced = [0] * runner.max_batch_size
        self._drafting = False  # whether the last round had drafts

    def admit(
        self, rows: Tensor, token_ids: Tensor, lengths: Tensor, hidden: Tensor | None
    ) -> None:
        if not self._drafting:  # prompts are caught up with when drafts are wanted, maybe never
            self.release(rows.tolist())
            return
        # The last token is read again when drafting starts.
        before = lengths.clamp(max=self._limit) - 1
        some = before > 0
        if bool(some.any()):
            known = self._known(token_ids[:, : int(before.max())])
            self.runner.prefill(rows[some], known[some], before[some])
        for row, length in zip(rows.tolist(), before.tolist(), strict=True):
            self._synced[row] = length

    @torch.inference_mode()
    def propose(self, state: StepState, gamma: int) -> Draft:
        self._drafting = True
        longest = self._chains.longest(state, gamma)
        if not longest:
            return empty_draft(state, gamma)
        draft = self._draft(state, longest)
        # Only now: a round that failed on the way is drafted again from where it was.
        for row, length in state.rows_and_lengths():
            self._synced[row] = length + longest
        return draft

    def _draft(self, state: StepState, gamma: int) -> Draft:
        limit, lag = self._limit, self._lag(state)
        longest = max(state.host_lengths)
        walks = not self.runner.static and self._same_ids and longest + gamma <= limit
        if walks and self._sampler.takes_argmax(state.rows):
            known = state.rows, state.lengths, state.current, state.previous
            tokens, positions = _opening(lag, state.tokens, *known)
            whole = self.runner.continue_greedily(tokens, state.rows, positions, gamma, longest)
            if whole is not None:
                return DraftChain(self._sampler, *known[:2], gamma).take(*whole)
        graphs = self.runner.graphs
        if graphs is not None and lag:
            lag = _INLINE_LAG  # what is read twice does no harm, and each lag would be a graph
        self.runner.cache.reserve(min(longest + gamma, limit))
        steps = partial(self._steps, gamma, lag, state.tokens)
        key = self.name, lag, state.tokens.data_ptr() if lag else 0
        return self._chains.draft(graphs, key, steps, state, gamma)

    def _steps(
        self,
        gamma: int,
        lag: int,
        history: Tensor,
        reach: Reach,
        rows: Tensor,
        lengths: Tensor,
        current: Tensor,
        previous: Tensor,
    ) -> DraftChain:
        tokens, positions = _opening(lag, history, rows, lengths, current, previous)
        last = torch.full_like(rows, tokens.shape[1] - 1)[:, None]
        chain = DraftChain(self._sampler, rows, lengths, gamma)
        for step in range(gamma):
            if step:
                positions = lengths[:, None] + step
            logits, _ = self.runner.run(
                self._known(tokens),
                rows,
                reach.place(positions, step),
                reach.length(step),
                logits_positions=None if step else last,
                settled=lengths - 1,
            )
            tokens = chain.draw(fit_vocab(logits, self._sampler.vocab_size))
        return chain

    def commit(self, state_before: StepState, verdict: Verdict, hidden: Tensor | None) -> None:
        if verdict.tokens.shape[1] > 1:
            return
        self._drafting = False
        # A round without drafts: what an earlier round drafted beyond this state was rejected.
        for row, length in state_before.rows_and_lengths():
            self._synced[row] = min(self._synced[row], length)

    def forget_drafts(self, state: StepState) -> None:
        """The last ``propose`` at ``state`` was overridden: trust only the tokens it was given."""
        for row, length in state.rows_and_lengths():
            self._synced[row] = length + 1

    def release(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._synced[int(row)] = 0

    def _lag(self, state: StepState) -> int:
        """Tokens before the last two that the first step feeds as well.

        Those that earlier rounds at gamma 0 left unseen; a long backlog is run on its own, for the
        rows that have one.
        """
        # A row that has outgrown the draft model has nothing to catch up with.
        lengths = [
            (row, length) for row, length in state.rows_and_lengths() if length < self._limit
        ]
        lag = max(length - 1 - self._synced[row] for row, length in lengths)
        if lag > (0 if self._stateful else _INLINE_LAG):
            self._catch_up(state, lengths)
            lag = 0
        return max(lag, 0)

    def _catch_up(self, state: StepState, lengths: list[tuple[int, int]]) -> None:
        """Run every token before ``previous`` that the draft model has not seen."""
        device = state.rows.device
        behind = [(row, self._synced[row], length - 1) for row, length in lengths]
        behind = [span for span in behind if span[1] < span[2]]
        if self._stateful:  # what fails on the way has left states that nobody knows
            self.release([row for row, _, _ in behind])
        rows, start, stop = torch.tensor(behind, device=device).unbind(1)
        no_logits = torch.zeros(len(behind), 0, dtype=torch.int64, device=device)
        backlog = max(stop - start for _, start, stop in behind)
        for first in range(0, backlog, _CHUNK):
            step = torch.arange(first, min(first + _CHUNK, backlog), device=device)
            positions = start[:, None] + step
            tokens = state.tokens[rows[:, None], positions.clamp(max=state.tokens.shape[1] - 1)]
            self.runner.forward(
                self._known(tokens),
                rows,
                torch.where(positions < stop[:, None], positions, -1),
                logits_positions=no_logits,
                max_position=max(stop for _, _, stop in behind) - 1,
                settled=torch.minimum(start + first + len(step), stop),
            )

    def _known(self, tokens: Tensor) -> Tensor:
        """Ids past the draft's embedding table, which only the target knows, become its last."""
        return tokens if self._same_ids else tokens.clamp(max=self._last_id)


def with_own_modules(model: Any) -> Any:
    """A copy of a model that shares its weights: replacing a layer of it leaves ``model`` whole.

    Memory grows by what is replaced, not by another model.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    shared = {
        id(x): torch.nn.Parameter(x.detach(), x.requires_grad)
        if isinstance(x, torch.nn.Parameter)
        else x
        for x in tensors
    }
    return copy.deepcopy(model, shared)


def _opening(
    lag: int, history: Tensor, rows: Tensor, lengths: Tensor, current: Tensor, previous: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens and positions ``[B, 2 + lag]`` of the first step, the last column ``current``.

    Args:
        lag: more tokens than the last two.
        history: of all rows and of padding, by position.
        rows, lengths, current, previous: of the state.
    """
    if not lag:
        positions = torch.stack([lengths - 1, lengths], dim=1)
        return torch.stack([previous, current], dim=1), positions
    positions = lengths[:, None] + torch.arange(-1 - lag, 1, device=rows.device)
    places = positions.clamp(min=0, max=history.shape[1] - 1)
    tokens = history[rows[:, None], places]
    # A row shorter than the backlog of another has nothing before position 0.
    return tokens, torch.where(positions >= 0, positions, -1)

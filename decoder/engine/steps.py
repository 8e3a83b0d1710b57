"""What a round does on tensors alone, and its graphs: forward, decision, commit.

On a GPU each of the three is one captured call, for a round's few large operations would wait
for hundreds of small ones. The forward has a graph to itself, so that its time can be told from
the rest. A request's own logits processor is Python, and log-probabilities are read back: rounds
of rows that have either run as they do on a CPU, but for the forward.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from decoder.drafters.base import within
from decoder.drafters.chain import shared_probs
from decoder.errors import reason
from decoder.model.capture import SharedMemory
from decoder.model.graphs import StepGraphs
from decoder.model.runner import ModelRunner
from decoder.requests.sequence import ActiveSequence
from decoder.round import Draft, StepState, Verdict
from decoder.sampling import Probs, Sampler

from .batch import LiveBatch
from .recovery import retried

logger = logging.getLogger(__name__)


class Decision(NamedTuple):
    """What the target makes of a draft.

    Attributes:
        verdict: accepted counts ``[B]`` and emitted tokens ``[B, G + 1]``.
        drafted: ``[B]`` int64, drafts that were verified.
        report: ``[B, G + 4]`` int64: whether a row's logits were undefined where they mattered,
            drafted and accepted counts, then the emitted tokens.
        probs: the target's distributions.
    """

    verdict: Verdict
    drafted: Tensor
    report: Tensor
    probs: Probs


def decided(
    sampler: Sampler, logits: Tensor, rows: Tensor, positions: Tensor, draft: Draft | None
) -> Decision:
    """The decision on ``draft`` by logits ``[B, G + 1, V]`` at ``positions`` ``[B, G + 1]``."""
    prefix = None if draft is None else draft.tokens
    probs = sampler.distribution(logits, rows, positions + 1, prefix)
    assert probs.undefined is not None
    if draft is None:
        token = sampler.draw(probs, rows, positions[:, 0] + 1)
        verdict = Verdict(torch.zeros_like(token), token[:, None])
        drafted, undefined = torch.zeros_like(token), probs.undefined[:, 0]
    else:
        verdict = sampler.verify(probs, draft, rows, positions + 1)
        # What follows a rejected draft was never met.
        column = torch.arange(draft.gamma + 1, device=positions.device)
        met = probs.undefined & (column <= verdict.accepted[:, None])
        drafted, undefined = draft.lengths, met.any(dim=1)
    counts = torch.stack([undefined, drafted, verdict.accepted], 1)
    return Decision(verdict, drafted, torch.cat([counts, verdict.tokens], 1), probs)


def placed(lengths: Tensor, queries: int, limit: int, largest: int) -> Tensor:
    """Positions ``[B, queries]`` from ``lengths`` on, but for those at or past ``limit``."""
    if queries == 1:
        return within(lengths[:, None], limit, largest)
    positions = lengths[:, None] + torch.arange(queries, device=lengths.device)
    # The longest draft of a batch may reach beyond the end of a row that is nearly full.
    return within(positions, limit, largest)


class RoundSteps:
    """The steps of a round as captured calls.

    Args:
        runner: of the target.
        sampler: decides on tokens.
        batch: the live rows.
        longest_draft: that there is.
    """

    def __init__(
        self, runner: ModelRunner, sampler: Sampler, batch: LiveBatch, longest_draft: int
    ) -> None:
        self._runner, self._sampler, self._batch = runner, sampler, batch
        self._logits = SharedMemory(runner.device)
        self._largest = runner.max_batch_size * (longest_draft + 1) * runner.vocab_size
        # Of padding: rows that nobody lives in, at a position that no row has.
        self._nowhere = [runner.max_batch_size, runner.max_length]

    def graphs(self, sequences: Sequence[ActiveSequence]) -> StepGraphs | None:
        """What a round of these rows is captured in, or ``None``."""
        if not self._runner.static or self._sampler.has_processors:
            return None
        asked = any(sequence.request.params.logprobs is not None for sequence in sequences)
        return None if asked else self._runner.graphs

    def forward(
        self,
        graphs: StepGraphs,
        state: StepState,
        draft: Draft | None,
        hidden_layers: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The target on each row's current token and its draft.

        Returns:
            Logits of the whole bucket ``[batch, G + 1, V]``, for ``decide``; hidden states
            ``[B, G + 1, n * H]`` that stay until the next round.
        """
        B, gamma = len(state.host_lengths), 0 if draft is None else draft.gamma
        runner, layers = self._runner, None if hidden_layers is None else tuple(hidden_layers)
        last = min(max(state.host_lengths) + gamma, runner.max_length - 1)
        shape = graphs.bucket(B), gamma + 1, runner.vocab_size
        logits = self._logits.shaped(shape, runner.logits_dtype, self._largest)
        view = graphs.view(last + 1)
        inputs, padding = [state.rows, state.lengths, state.current], [*self._nowhere, 0]
        if draft is not None:
            inputs, padding = [*inputs, draft.tokens], [*padding, 0]
        run = partial(self._forward, logits, view, layers)
        hidden = graphs.call(("verify", view, layers, logits.data_ptr()), run, inputs, padding)
        return logits, hidden[0] if hidden else None

    def _forward(
        self,
        to: Tensor,
        view: int,
        hidden_layers: tuple[int, ...] | None,
        rows: Tensor,
        lengths: Tensor,
        current: Tensor,
        *drafted: Tensor,
    ) -> list[Tensor]:
        ids = torch.cat([current[:, None], *drafted], dim=1)
        limit = self._runner.max_length
        positions = placed(lengths, ids.shape[1], limit, limit)
        logits, hidden = self._runner.run(ids, rows, positions, view, hidden_layers)
        to.copy_(logits)
        return [] if hidden is None else [hidden]

    def decide(
        self, graphs: StepGraphs, logits: Tensor, state: StepState, draft: Draft | None
    ) -> tuple[Tensor, Verdict, Tensor]:
        """``decided`` of ``forward``'s logits: report, verdict, drafted counts.

        They stay until the next round.
        """
        inputs, padding = [state.rows, state.lengths], self._nowhere
        probs = None
        if draft is not None:
            inputs, padding = [*inputs, draft.tokens, draft.lengths], [*padding, 0, 0]
            if draft.probs is not None:
                probs = shared_probs(self._sampler, draft.probs, len(logits))
        where = None if probs is None else (probs.data_ptr(), probs.dtype)
        key = "decide", self._sampler.plan(logits.dtype), logits.data_ptr(), logits.dtype, where
        run = partial(self._decide, logits, probs)
        report, accepted, tokens, counts = graphs.call(key, run, inputs, padding)
        return report, Verdict(accepted, tokens), counts

    def _decide(
        self, logits: Tensor, probs: Tensor | None, rows: Tensor, lengths: Tensor, *drafted: Tensor
    ) -> list[Tensor]:
        draft = None
        if drafted:
            tokens, counts = drafted
            draft = self.cut(Draft(tokens, probs, counts), rows, lengths)
        limit = self._runner.max_length
        positions = placed(lengths, logits.shape[1], limit, limit)
        verdict, counted, report, _ = decided(self._sampler, logits, rows, positions, draft)
        return [report, verdict.accepted, verdict.tokens, counted]

    def cut(self, draft: Draft, rows: Tensor, lengths: Tensor) -> Draft:
        """The draft with no more tokens in a row than it may still emit; waits for nothing."""
        room = (self._batch.last[rows] - lengths).clamp(0, draft.gamma)
        return Draft(draft.tokens, draft.probs, torch.minimum(draft.lengths, room))

    def commit(
        self,
        graphs: StepGraphs | None,
        verdict: Verdict,
        drafted: Tensor | None,
        accepted: Sequence[int],
    ) -> None:
        """Have the sampler and the batch take a round, each all of it or, if this raises, nothing.

        Args:
            verdict, drafted: of every live row; ``drafted`` is ``None`` where there were no drafts.
            accepted: ``verdict.accepted``, on the host.
        """
        state, sampler, batch = self._batch.state, self._sampler, self._batch
        if graphs is not None:
            try:
                batch.become(self._captured_commit(graphs, verdict, drafted), accepted)
                return
            except Exception as error:
                logger.debug("committed without a graph after %s", reason(error), exc_info=True)
        counts = verdict.accepted + 1
        retried(partial(sampler.commit, state.rows, verdict.tokens, counts, drafted))
        retried(partial(batch.advance, verdict, accepted))

    def _captured_commit(
        self, graphs: StepGraphs, verdict: Verdict, drafted: Tensor | None
    ) -> list[Tensor]:
        state = self._batch.state
        inputs = [state.rows, state.lengths, state.current, verdict.accepted, verdict.tokens]
        padding = [*self._nowhere, 0, 0, 0]
        if drafted is not None:
            inputs, padding = [*inputs, drafted], [*padding, 0]
        key = "commit", self._sampler.plan(self._runner.logits_dtype)
        return graphs.call(key, self._commit, inputs, padding)

    def _commit(
        self,
        rows: Tensor,
        lengths: Tensor,
        current: Tensor,
        accepted: Tensor,
        tokens: Tensor,
        *drafted: Tensor,
    ) -> list[Tensor]:
        moved = self._batch.moved(rows, lengths, current, accepted, tokens)
        # Last, for nothing may raise once something is counted.
        self._sampler.commit(rows, tokens, accepted + 1, *drafted)
        return moved

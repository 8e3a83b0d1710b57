"""The verify forward and what it decides, of a batch or of some rows; it commits nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from decoder.model.graphs import StepGraphs
from decoder.model.runner import ForwardOutput, ModelRunner
from decoder.requests.outputs import TokenLogprob
from decoder.requests.sequence import ActiveSequence
from decoder.round import Draft, StepState, Verdict, on_host
from decoder.sampling import Sampler

from .batch import LiveBatch, token_logprobs
from .phases import PhaseClock
from .steps import RoundSteps, decided, placed


class Verified(NamedTuple):
    """A verify forward's outcome.

    Attributes:
        verdict: accepted counts ``[B]`` and emitted tokens ``[B, G + 1]``.
        drafted: ``[B]`` int64, drafts that were verified.
        hidden: ``[B, G + 1, n * H]`` for the drafter, or ``None``.
        report: on the host, by row: whether its logits were undefined where they mattered,
            drafted and accepted counts, then the emitted tokens.
        logprobs: by row, of its emitted tokens; empty where nobody asked.
        graphs: that it was found out in, for its commit; the tensors are theirs.
    """

    verdict: Verdict
    drafted: Tensor
    hidden: Tensor | None
    report: list[list[int]]
    logprobs: list[list[TokenLogprob]]
    graphs: StepGraphs | None = None

    @property
    def gamma(self) -> int:
        return self.verdict.tokens.shape[1] - 1

    @property
    def undefined(self) -> list[int]:
        """Places in the batch of the rows whose logits were undefined."""
        return [i for i, row in enumerate(self.report) if row[0]]

    def row(self, index: int) -> Verified:
        """The outcome of one row, by its place in the batch."""
        own = slice(index, index + 1)
        return Verified(
            Verdict(self.verdict.accepted[own], self.verdict.tokens[own]),
            self.drafted[own],
            None if self.hidden is None else self.hidden[own],
            self.report[own],
            self.logprobs[own],
        )


class Verification:
    """Runs verify forwards.

    Args:
        runner: of the target.
        sampler: decides on tokens.
        batch: the live rows.
        clock: of the round.
        longest_draft: that there is.

    Attributes:
        steps: of a round; the last of them commits what this finds out.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Sampler,
        batch: LiveBatch,
        clock: PhaseClock,
        longest_draft: int,
    ) -> None:
        self._runner, self._sampler, self._clock = runner, sampler, clock
        self.steps = RoundSteps(runner, sampler, batch, longest_draft)

    def __call__(
        self,
        state: StepState,
        sequences: Sequence[ActiveSequence],
        draft: Draft | None,
        hidden_layers: Sequence[int] | None,
        alone: bool = False,
    ) -> Verified:
        """What the target makes of ``draft`` in each row; can be repeated.

        Args:
            state, sequences: the rows.
            draft: of them; ``None`` for none.
            hidden_layers: that the drafter needs.
            alone: this is one row of several whose outcomes are kept: not in graphs, for which the
                next one would overwrite it.
        """
        graphs = None if alone else self.steps.graphs(sequences)
        if graphs is None:
            return self._by_operation(state, sequences, draft, hidden_layers)
        logits, hidden = self.steps.forward(graphs, state, draft, hidden_layers)
        self._clock.mark("verify")
        found, verdict, drafted = self.steps.decide(graphs, logits, state, draft)
        report: list[list[int]] = found.tolist()
        self._clock.mark("sample")
        return Verified(verdict, drafted, hidden, report, [[] for _ in sequences], graphs)

    def _by_operation(
        self,
        state: StepState,
        sequences: Sequence[ActiveSequence],
        draft: Draft | None,
        hidden_layers: Sequence[int] | None,
    ) -> Verified:
        """The same without graphs but the forward's."""
        if draft is not None and not on_host(draft.lengths.device):
            draft = self.steps.cut(draft, state.rows, state.lengths)
        out, positions = self._forward(state, draft, hidden_layers)
        self._clock.mark("verify")
        logits = self._sampler.processed(out.logits, state.rows, draft)
        verdict, drafted, found, probs = decided(
            self._sampler, logits, state.rows, positions, draft
        )
        # The round's only device-to-host copy.
        report: list[list[int]] = found.tolist()
        logprobs = token_logprobs(self._sampler, sequences, out.logits, probs, verdict.tokens)
        self._clock.mark("sample")
        return Verified(verdict, drafted, out.hidden, report, logprobs)

    def _forward(
        self, state: StepState, draft: Draft | None, hidden_layers: Sequence[int] | None
    ) -> tuple[ForwardOutput, Tensor]:
        """The target on each row's current token and its draft; outputs and their positions."""
        ids, limit = state.current[:, None], self._runner.max_length
        last = max(state.host_lengths)
        if draft is not None:
            ids = torch.cat([ids, draft.tokens], dim=1)
            last += draft.gamma
        positions = placed(state.lengths, ids.shape[1], limit, last)
        out = self._runner.forward(
            ids,
            state.rows,
            positions,
            hidden_layers=hidden_layers,
            max_position=min(last, limit - 1),
        )
        return out, positions


def joined(parts: Sequence[Verified]) -> Verified:
    """The outcome of a batch from those of its rows, padded to the longest draft."""
    gamma = max(part.gamma for part in parts)
    missing = [gamma - part.gamma for part in parts]
    tokens = [pad(p.verdict.tokens, (0, n), value=-1) for p, n in zip(parts, missing, strict=True)]
    hidden = [
        pad(p.hidden, (0, 0, 0, n))
        for p, n in zip(parts, missing, strict=True)
        if p.hidden is not None
    ]
    return Verified(
        Verdict(torch.cat([p.verdict.accepted for p in parts]), torch.cat(tokens)),
        torch.cat([part.drafted for part in parts]),
        torch.cat(hidden) if hidden else None,
        [row for part in parts for row in part.report],
        [row for part in parts for row in part.logprobs],
    )

"""The verify forward and what it decides, of a batch or of some rows; it commits nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from decoder.drafters.base import within
from decoder.model.runner import ForwardOutput, ModelRunner
from decoder.requests.outputs import TokenLogprob
from decoder.requests.sequence import ActiveSequence
from decoder.round import Draft, StepState, Verdict
from decoder.sampling import Sampler

from .batch import token_logprobs
from .phases import PhaseClock


class Verified(NamedTuple):
    """A verify forward's outcome.

    Attributes:
        verdict: accepted counts ``[B]`` and emitted tokens ``[B, G + 1]``.
        drafted: ``[B]`` int64, drafts that were verified.
        hidden: ``[B, G + 1, n * H]`` for the drafter, or ``None``.
        report: on the host, by row: whether its logits were undefined where they mattered,
            drafted and accepted counts, then the emitted tokens.
        logprobs: by row, of its emitted tokens; empty where nobody asked.
    """

    verdict: Verdict
    drafted: Tensor
    hidden: Tensor | None
    report: list[list[int]]
    logprobs: list[list[TokenLogprob]]

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
        clock: of the round.
    """

    def __init__(self, runner: ModelRunner, sampler: Sampler, clock: PhaseClock) -> None:
        self._runner, self._sampler, self._clock = runner, sampler, clock

    def __call__(
        self,
        state: StepState,
        sequences: Sequence[ActiveSequence],
        draft: Draft | None,
        hidden_layers: Sequence[int] | None,
    ) -> Verified:
        """What the target makes of ``draft`` in each row; can be repeated.

        Args:
            state, sequences: the rows.
            draft: of them; ``None`` for none.
            hidden_layers: that the drafter needs.
        """
        out, positions = self._forward(state, draft, hidden_layers)
        self._clock.mark("verify")
        prefix = None if draft is None else draft.tokens
        logits = self._sampler.processed(out.logits, state.rows, draft)
        probs = self._sampler.distribution(logits, state.rows, positions + 1, prefix)
        assert probs.undefined is not None
        if draft is None:
            token = self._sampler.draw(probs, state.rows, state.lengths + 1)
            verdict = Verdict(torch.zeros_like(token), token[:, None])
            drafted, undefined = torch.zeros_like(token), probs.undefined[:, 0]
        else:
            verdict = self._sampler.verify(probs, draft, state.rows, positions + 1)
            # What follows a rejected draft was never met.
            column = torch.arange(draft.gamma + 1, device=positions.device)
            met = probs.undefined & (column <= verdict.accepted[:, None])
            drafted, undefined = draft.lengths, met.any(dim=1)
        counts = torch.stack([undefined, drafted, verdict.accepted], 1)
        # The round's only device-to-host copy.
        report: list[list[int]] = torch.cat([counts, verdict.tokens], 1).tolist()
        logprobs = token_logprobs(self._sampler, sequences, out.logits, probs, verdict.tokens)
        self._clock.mark("sample")
        return Verified(verdict, drafted, out.hidden, report, logprobs)

    def _forward(
        self, state: StepState, draft: Draft | None, hidden_layers: Sequence[int] | None
    ) -> tuple[ForwardOutput, Tensor]:
        """The target on each row's current token and its draft; outputs and their positions."""
        ids, positions = state.current[:, None], state.lengths[:, None]
        last = max(state.host_lengths)
        if draft is not None:
            ids = torch.cat([ids, draft.tokens], dim=1)
            last += draft.gamma
            positions = positions + torch.arange(ids.shape[1], device=ids.device)
            # The longest draft of a batch may reach beyond the end of a row that is nearly full.
            positions = within(positions, self._runner.max_length, last)
        out = self._runner.forward(
            ids,
            state.rows,
            positions,
            hidden_layers=hidden_layers,
            max_position=min(last, self._runner.max_length - 1),
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

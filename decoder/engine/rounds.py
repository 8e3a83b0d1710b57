"""What a step does: prefill new rows, or verify a draft for every live one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decoder.drafters.base import Drafter
from decoder.gamma.base import Controller
from decoder.model.runner import ForwardOutput, ModelRunner
from decoder.requests.outputs import TokenLogprob
from decoder.requests.reader import Request
from decoder.requests.sequence import ActiveSequence
from decoder.round import Draft, Verdict
from decoder.sampling import Sampler

from .batch import LiveBatch, padded, token_logprobs
from .metrics import DecoderStats
from .phases import PhaseClock


class Rounds:
    """The live sequences, and what happens to them on the device.

    Args:
        runner: of the target.
        drafter: bound to it.
        sampler: decides on tokens.
        width: positions of a row, drafts included.
        tokenizer: for stop strings and text, or ``None``.
    """

    def __init__(
        self, runner: ModelRunner, drafter: Drafter, sampler: Sampler, width: int, tokenizer: Any
    ) -> None:
        self.runner, self.drafter, self.sampler = runner, drafter, sampler
        self.tokenizer = tokenizer
        self.batch = LiveBatch(runner.max_batch_size, width, runner.device)
        self._clock = PhaseClock(runner.device)

    @torch.inference_mode()
    def admit(
        self, requests: Sequence[Request], controller: Controller, stats: DecoderStats
    ) -> None:
        """Prefill prompts into free rows and draw their first tokens.

        Raises:
            FloatingPointError: logits that define no distribution.
        """
        clock, batch, device = self._clock, self.batch, self.runner.device
        clock.start()
        host_rows = batch.take_rows(len(requests))
        sequences = [
            ActiveSequence(request, row, self.tokenizer)
            for request, row in zip(requests, host_rows, strict=True)
        ]
        ids = padded([request.prompt_ids for request in requests], device)
        rows = torch.tensor(host_rows, dtype=torch.int64, device=device)
        lengths = torch.tensor([len(r.prompt_ids) for r in requests], device=device)
        for request, row in zip(requests, host_rows, strict=True):
            self.sampler.admit(row, request.params, request.prompt_ids, request.stop_ids)
        out = self.runner.prefill(rows, ids, lengths, hidden_layers=self.drafter.hidden_layers)
        probs = self.sampler.distribution(out.logits, rows, lengths[:, None], None)
        first = self.sampler.draw(probs, rows, lengths)
        self.sampler.commit(rows, first[:, None], torch.ones_like(rows))
        clock.mark("prefill")
        self.drafter.admit(rows, ids, lengths, out.hidden)
        clock.mark("draft")
        batch.write_prompts(rows, ids)
        batch.append(sequences, rows, lengths, first, ids.gather(1, lengths[:, None] - 1)[:, 0])
        logprobs = token_logprobs(self.sampler, sequences, out.logits, probs, first[:, None])
        report = torch.stack([self.sampler.failed(rows), first], 1).tolist()
        self._refuse_failures(host_rows, [failed for failed, _ in report])
        for sequence, (_, token), values in zip(sequences, report, logprobs, strict=True):
            sequence.extend([token], 0)
            sequence.logprobs.extend(values[:1])
        clock.mark("prefill")
        seconds = clock.stop()
        stats.seconds["prefill"] += seconds["prefill"] + seconds["draft"]
        expected = sum(stats.mean_output(sequence.remaining) for sequence in sequences)
        controller.admitted(expected, seconds["draft"])

    @torch.inference_mode()
    def verify(self, controller: Controller, stats: DecoderStats) -> None:
        """One verify forward for every live row: each gains at least a token.

        Raises:
            FloatingPointError: logits that define no distribution.
        """
        clock, batch, state = self._clock, self.batch, self.batch.state
        clock.start()
        longest = max(state.host_lengths)
        gamma = self._choose_gamma(controller, sum(state.host_lengths) // len(batch))
        clock.mark("host")
        draft = self._propose(gamma) if gamma else None
        clock.mark("draft")
        gamma = draft.gamma if draft is not None else 0
        out, positions = self._forward(draft, longest + gamma)
        clock.mark("verify")
        probs = self.sampler.distribution(
            out.logits, state.rows, positions + 1, None if draft is None else draft.tokens
        )
        if draft is None:
            token = self.sampler.draw(probs, state.rows, state.lengths + 1)
            verdict = Verdict(torch.zeros_like(token), token[:, None])
        else:
            verdict = self.sampler.verify(probs, draft, state.rows, positions + 1)
        self.sampler.commit(state.rows, verdict.tokens, verdict.accepted + 1)
        drafted = torch.zeros_like(state.lengths) if draft is None else draft.lengths
        counts = torch.stack([self.sampler.failed(state.rows), verdict.accepted, drafted], 1)
        # The round's only device-to-host copy.
        report: list[list[int]] = torch.cat([counts, verdict.tokens], 1).tolist()
        self._refuse_failures(state.host_rows, [row[0] for row in report])
        clock.mark("sample")
        self.drafter.commit(state, verdict, out.hidden)
        clock.mark("draft")
        logprobs = token_logprobs(self.sampler, batch.sequences, out.logits, probs, verdict.tokens)
        accepted, drafts = [row[1] for row in report], [row[2] for row in report]
        batch.advance(verdict, accepted)
        self._extend(accepted, drafts, [row[3:] for row in report], logprobs)
        clock.mark("host")
        seconds = clock.stop()
        stats.observe(gamma, drafts, accepted, seconds)
        controller.observe(gamma, len(report), drafts, accepted, seconds)

    def drop(self, sequences: Sequence[ActiveSequence]) -> None:
        """Free the rows of these sequences; nothing of them is kept."""
        self._release(self.batch.remove(sequences))

    def clear(self) -> None:
        """Free every row, also one whose admission did not end."""
        self._release(self.batch.clear())

    def _release(self, rows: list[int]) -> None:
        if rows:
            self.drafter.release(rows)
        for row in rows:
            self.sampler.release(row)

    def _choose_gamma(self, controller: Controller, context: int) -> int:
        remaining = max(sequence.remaining for sequence in self.batch.sequences)
        return min(controller.choose(len(self.batch), context), remaining - 1)

    def _propose(self, gamma: int) -> Draft | None:
        """A draft cut to what rows may still emit; ``None`` when no row has anything to verify.

        Both cuts look at nothing but lengths, which depend on the context only.
        """
        draft = self.drafter.propose(self.batch.state, gamma)
        return draft.limited([sequence.remaining - 1 for sequence in self.batch.sequences])

    def _forward(self, draft: Draft | None, max_position: int) -> tuple[ForwardOutput, Tensor]:
        """The target on each row's current token and its draft; outputs and their positions."""
        state = self.batch.state
        ids, positions = state.current[:, None], state.lengths[:, None]
        if draft is not None:
            ids = torch.cat([ids, draft.tokens], dim=1)
            positions = positions + torch.arange(ids.shape[1], device=ids.device)
        out = self.runner.forward(
            ids,
            state.rows,
            positions,
            hidden_layers=self.drafter.hidden_layers,
            max_position=max_position,
        )
        return out, positions

    def _extend(
        self,
        accepted: list[int],
        drafted: list[int],
        tokens: list[list[int]],
        logprobs: list[list[TokenLogprob]],
    ) -> None:
        rounds = zip(self.batch.sequences, accepted, drafted, tokens, logprobs, strict=True)
        for sequence, kept, proposed, emitted, values in rounds:
            sequence.extend(emitted[: kept + 1], kept)
            sequence.logprobs.extend(values[: kept + 1])
            sequence.stats.rounds += 1
            sequence.stats.accepted += kept
            sequence.stats.drafted += proposed

    def _refuse_failures(self, rows: Sequence[int], failed: Sequence[int]) -> None:
        if any(failed):
            self.sampler.refuse([row for row, bad in zip(rows, failed, strict=True) if bad])

"""What a step does: prefill new rows, or verify a draft for every live one.

Both first find out everything that can fail and then commit it, so that a failure leaves the rows
as they were. It is tried again, then row by row, until only the rows concerned are lost.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from decoder.drafters.base import Drafter
from decoder.errors import reason
from decoder.gamma.base import Controller
from decoder.model.runner import ModelRunner
from decoder.requests.reader import Request
from decoder.requests.sequence import ActiveSequence
from decoder.round import Draft, on_host
from decoder.sampling import Sampler

from .batch import LiveBatch, padded, token_logprobs
from .metrics import DecoderStats
from .phases import PhaseClock
from .recovery import Tolerance, UndefinedLogits, retried
from .verification import Verification, Verified, joined

logger = logging.getLogger(__name__)


class Rounds:
    """The live sequences, and what happens to them on the device.

    Args:
        runner: of the target.
        drafter: bound to it.
        sampler: decides on tokens.
        longest_draft: that a row's history has room for beyond the longest row.
        tokenizer: for stop strings and text, or ``None``.
    """

    def __init__(
        self,
        runner: ModelRunner,
        drafter: Drafter,
        sampler: Sampler,
        longest_draft: int,
        tokenizer: Any,
    ) -> None:
        self.runner, self.drafter, self.sampler = runner, drafter, sampler
        self.tokenizer = tokenizer
        self._longest_draft = longest_draft
        width = runner.max_length + longest_draft + 2
        self.batch = LiveBatch(runner.max_batch_size, width, runner.device)
        self._clock = PhaseClock(runner.device)
        self._verify = Verification(runner, sampler, self.batch, self._clock, longest_draft)
        self._tolerance = Tolerance()

    def admit(
        self, requests: Sequence[Request], controller: Controller, stats: DecoderStats
    ) -> list[ActiveSequence]:
        """Prefill prompts into free rows and draw their first tokens.

        Returns:
            Those that failed: in the group, and then alone.
        """
        with suppress(Exception):  # the reason that counts is the one of a request alone
            self._admit(requests, controller, stats)
            return []
        failed = []
        for request in requests:
            try:
                self._admit([request], controller, stats)
            except Exception as error:
                failed.append(self._failed(ActiveSequence(request, -1, self.tokenizer), error))
        return failed

    def _admit(
        self, requests: Sequence[Request], controller: Controller, stats: DecoderStats
    ) -> None:
        """All of the requests or, when it raises, none."""
        self._clock.start()
        rows = self.batch.take_rows(len(requests))
        try:
            sequences = self._prefill(requests, rows)
        except Exception:
            self._release(rows)
            self._scrub(rows)
            self.batch.give_back(rows)
            raise
        note = partial(self._note_admission, sequences, controller, stats)
        self._tolerance.call("the statistics", note, None)

    def _note_admission(
        self, sequences: Sequence[ActiveSequence], controller: Controller, stats: DecoderStats
    ) -> None:
        seconds = self._clock.stop()
        expected = sum(stats.output_to_expect(sequence.remaining) for sequence in sequences)
        stats.seconds["prefill"] += seconds["prefill"] + seconds["draft"]
        prompts = sum(sequence.stats.prompt_tokens for sequence in sequences)
        admitted = partial(controller.admitted, expected, seconds["draft"], prompts)
        self._tolerance.call("the controller's admitted", admitted, None)

    @torch.inference_mode()
    def _prefill(self, requests: Sequence[Request], host_rows: list[int]) -> list[ActiveSequence]:
        clock, batch, device = self._clock, self.batch, self.runner.device
        places = zip(requests, host_rows, strict=True)
        sequences = [ActiveSequence(r, row, self.tokenizer) for r, row in places]
        ids = padded([request.prompt_ids for request in requests], device)
        rows = torch.tensor(host_rows, dtype=torch.int64, device=device)
        lengths = torch.tensor([len(r.prompt_ids) for r in requests], device=device)
        for r, row in zip(requests, host_rows, strict=True):
            self.sampler.admit(row, r.params, r.prompt_ids, r.stop_ids, r.process)
        out = self.runner.prefill(rows, ids, lengths, hidden_layers=self.drafter.hidden_layers)
        logits = self.sampler.processed(out.logits, rows, None)
        probs = self.sampler.distribution(logits, rows, lengths[:, None], None)
        assert probs.undefined is not None
        first = self.sampler.draw(probs, rows, lengths)
        report = torch.stack([probs.undefined[:, 0], first], 1).tolist()
        if any(undefined for undefined, _ in report):
            raise UndefinedLogits
        logprobs = token_logprobs(self.sampler, sequences, out.logits, probs, first[:, None])
        for sequence, (_, token), values in zip(sequences, report, logprobs, strict=True):
            retried(partial(sequence.extend, [token], 0, values))
        self.sampler.commit(rows, first[:, None], torch.ones_like(rows))
        clock.mark("prefill")
        admit = partial(self.drafter.admit, rows, ids, lengths, out.hidden)
        self._tolerance.call("the drafter's admit", admit, None)
        clock.mark("draft")
        batch.write_prompts(rows, ids)
        batch.append(sequences, rows, lengths, first, ids.gather(1, lengths[:, None] - 1)[:, 0])
        self._mark("prefill")
        return sequences

    @torch.inference_mode()
    def verify(self, controller: Controller, stats: DecoderStats) -> list[ActiveSequence]:
        """One verify forward for every live row: each gains at least a token.

        Returns:
            Those that failed; their rows are free.
        """
        verified, failed = self._verified(retried(partial(self._draft, controller)))
        self._lose(failed)
        if verified is None:
            return failed
        try:
            broken = self._commit(verified)
        except Exception as error:  # it is not known whose fault this is
            broken = [self._failed(sequence, error) for sequence in self.batch.sequences]
        self._lose(broken)
        note = partial(self._note_round, verified, controller, stats)
        self._tolerance.call("the statistics", note, None)
        return failed + broken

    def drop(self, sequences: Sequence[ActiveSequence]) -> None:
        """Free the rows of these sequences; nothing of them is kept."""
        self._release([sequence.row for sequence in sequences])
        retried(partial(self.batch.remove, sequences))

    def clear(self) -> None:
        """Free every row, also one whose admission did not end."""
        self._release(self.batch.taken_rows())
        self.batch.clear()

    def _release(self, rows: Sequence[int]) -> None:
        """Forget what is kept of rows, which are freed after it: an interrupt leaves them taken."""
        if rows:
            release = partial(self.drafter.release, rows)
            self._tolerance.call("the drafter's release", release, None)
        for row in rows:
            self._tolerance.call("the sampler's release", partial(self.sampler.release, row), None)

    def _lose(self, failed: Sequence[ActiveSequence]) -> None:
        if failed:
            self._scrub([sequence.row for sequence in failed])
            self.drop(failed)

    def _scrub(self, rows: Sequence[int]) -> None:
        """Nothing undefined may stay where another request will live."""
        for row in rows:
            self._tolerance.call("clearing a row", partial(self.runner.cache.scrub, row), None)

    def _choose_gamma(self, controller: Controller) -> int:
        """What the controller asks for, cut to what a row may still emit."""
        batch = self.batch
        context = sum(batch.state.host_lengths) // len(batch)
        room = max(sequence.remaining for sequence in batch.sequences) - 1

        def choose() -> int:
            return max(0, min(int(controller.choose(len(batch), context)), room))

        asked = self._tolerance.call("the controller's choose", choose, 0)
        return min(asked, self._longest_draft)

    def _draft(self, controller: Controller) -> Draft | None:
        """The round's draft; ``None`` when no row has anything to verify."""
        self._clock.start()
        gamma = self._choose_gamma(controller)
        self._clock.mark("host")
        draft = self._propose(gamma) if gamma else None
        self._clock.mark("draft")
        return draft

    def _propose(self, gamma: int) -> Draft | None:
        """A draft cut to what rows may still emit.

        Both cuts look at nothing but lengths, which depend on the context only.
        """

        def propose() -> Draft | None:
            draft = self.drafter.propose(self.batch.state, gamma)
            if draft.gamma > gamma:
                raise ValueError(f"a draft must have at most {gamma} tokens, got {draft.gamma}")
            room = [sequence.remaining - 1 for sequence in self.batch.sequences]
            # On an accelerator the verification cuts it, without waiting.
            return draft.limited(room) if on_host(draft.lengths.device) else draft

        return self._tolerance.call("the drafter's propose", propose, None)

    def _verified(self, draft: Draft | None) -> tuple[Verified | None, list[ActiveSequence]]:
        """The outcome of the rows that have one, together; and the others."""
        batch = self.batch
        everything = partial(
            self._verify, batch.state, batch.sequences, draft, self.drafter.hidden_layers
        )
        whole: Verified | None = None
        with suppress(Exception):
            whole = retried(everything)
        if whole is not None and not whole.undefined:
            return whole, []
        parts, failed = [], []
        for i, sequence in enumerate(batch.sequences):
            try:
                if whole is not None and i not in whole.undefined:
                    parts.append(whole.row(i))
                else:
                    parts.append(self._alone(i, draft))
            except Exception as error:
                failed.append(self._failed(sequence, error))
        return (joined(parts) if parts else None), failed

    def _alone(self, index: int, draft: Draft | None) -> Verified:
        """The outcome of one row by itself, without its draft if it fails with it."""
        state, sequence = self.batch.state.select([index]), self.batch.sequences[index]
        own = None if draft is None else draft.row(index)
        try:
            self.runner.cache.scrub(sequence.row, state.host_lengths[0])
            verified = self._verify(state, [sequence], own, self.drafter.hidden_layers, True)
            if verified.undefined:
                raise UndefinedLogits
            return verified
        except Exception:
            if draft is None:
                raise
        return self._alone(index, None)

    def _commit(self, verified: Verified) -> list[ActiveSequence]:
        """Every row takes what was decided; returns those that could not."""
        verdict, report = verified.verdict, verified.report
        drafted = verified.drafted if verified.gamma else None
        known = verdict._replace(host_tokens=[row[3:] for row in report])
        learn = partial(self.drafter.commit, self.batch.state, known, verified.hidden)
        self._tolerance.call("the drafter's commit", learn, None)
        self._mark("draft")
        self._verify.steps.commit(verified.graphs, verdict, drafted, [row[2] for row in report])
        failed = []
        outcomes = zip(self.batch.sequences, report, verified.logprobs, strict=True)
        for sequence, (_, proposed, kept, *emitted), values in outcomes:
            try:
                retried(partial(sequence.extend, emitted[: kept + 1], kept, values[: kept + 1]))
            except Exception as error:
                failed.append(self._failed(sequence, error))
                continue
            sequence.stats.rounds += 1
            sequence.stats.accepted += kept
            sequence.stats.drafted += proposed
        self._mark("host")
        return failed

    def _mark(self, phase: str) -> None:
        """As the clock does, in the middle of what must not be left half done."""
        self._tolerance.call("the clock", partial(self._clock.mark, phase), None)

    def _note_round(self, verified: Verified, controller: Controller, stats: DecoderStats) -> None:
        gamma, seconds = verified.gamma, self._clock.stop()
        drafted, accepted = ([row[i] for row in verified.report] for i in (1, 2))
        stats.observe(gamma, drafted, accepted, seconds)
        observe = partial(controller.observe, gamma, len(drafted), drafted, accepted, seconds)
        self._tolerance.call("the controller's observe", observe, None)

    def _failed(self, sequence: ActiveSequence, error: Exception) -> ActiveSequence:
        logger.debug("%s failed", sequence.request.name, exc_info=error)
        if isinstance(error, UndefinedLogits):
            self._tolerance.blame(self.runner.model)
        sequence.fail(reason(error))
        return sequence

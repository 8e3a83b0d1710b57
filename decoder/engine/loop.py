"""The decode loop: propose, verify, accept, commit; free rows are filled again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from decoder.drafters import Drafter, build_drafter
from decoder.errors import UserError
from decoder.gamma.base import Controller
from decoder.model.kernels import accelerate
from decoder.model.loading import eos_ids, load_model, load_tokenizer
from decoder.model.runner import ForwardOutput, ModelRunner
from decoder.requests.outputs import Output, TokenLogprob
from decoder.requests.params import SamplingParams
from decoder.requests.sequence import ActiveSequence, Prompt, Request, RequestReader
from decoder.round import Draft, Verdict
from decoder.sampling import Sampler

from .batch import LiveBatch, padded, token_logprobs
from .metrics import DecoderStats
from .phases import PhaseClock
from .settings import checked_length, make_controller

_AUTO_MAX_GAMMA = 8

Params = SamplingParams | Sequence[SamplingParams]


class SpeculativeDecoder:
    """Batched speculative decoding whose output is the target's own.

    Args:
        target: a transformers causal LM, or the directory of one.
        drafter: ``None`` or ``"none"`` (plain autoregressive), ``"ngram"``, ``"self"``, the
            directory of a draft model or EAGLE head, a loaded draft model, or a ``Drafter``.
        gamma: draft length, ``"auto"`` to choose it each round from measured costs and
            acceptance, or a ``Controller``.
        verifier: ``"standard"`` or ``"block"`` (output has the target's distribution), or
            ``"coupled"`` (output equals the target's own sampled output for the seed). Greedy
            output is the target's own under each.
        tokenizer: of the target; taken from the directory when ``target`` is one.
        max_batch_size: sequences decoded at once.
        max_length: longest prompt plus output; by default the model's context.
        max_gamma: longest draft that ``"auto"`` considers.
        kernels: let ``moesd_kernels`` run what it can of target and draft.
        attention: ``"auto"`` or ``"portable"``.
        static: run steps in fixed-size buffers, as CUDA graphs on a GPU; ``"auto"`` does so there.
        drafter_options: passed to ``build_drafter``, such as ``self_top_k``.

    Raises:
        UserError: a path, a combination or an architecture that cannot work.
    """

    def __init__(
        self,
        target: Any,
        drafter: Any = None,
        gamma: int | Literal["auto"] | Controller = "auto",
        verifier: Literal["standard", "block", "coupled"] = "standard",
        *,
        tokenizer: Any = None,
        max_batch_size: int = 16,
        max_length: int | None = None,
        max_gamma: int = _AUTO_MAX_GAMMA,
        kernels: bool = True,
        attention: str = "auto",
        static: bool | str = "auto",
        drafter_options: dict[str, Any] | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise UserError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if isinstance(target, (str, Path)):
            tokenizer = tokenizer or load_tokenizer(target)
            target = load_model(target)
        if kernels:
            accelerate(target)
        self.tokenizer = tokenizer
        options = {"kernels": kernels, **(drafter_options or {})}
        self.drafter: Drafter = build_drafter(drafter, target, tokenizer, **options)
        self.controller = make_controller(gamma, max_gamma, self.drafter)
        longest_draft = getattr(self.controller, "max_gamma", max_gamma)
        self.max_batch_size = max_batch_size
        self.max_length = checked_length(target, max_length, longest_draft)
        self.runner = ModelRunner(
            target,
            max_batch_size,
            self.max_length + longest_draft,
            attention=attention,
            static=static,
        )
        device = self.runner.device
        self.sampler = Sampler(max_batch_size, self.runner.vocab_size, device, verifier)
        self.drafter.bind(self.runner, self.sampler, max(longest_draft, 1))
        self.reader = RequestReader(
            tokenizer, self.runner.vocab_size, self.max_length, eos_ids(target)
        )
        width = self.max_length + longest_draft + 2
        self._batch = LiveBatch(max_batch_size, width, device)
        self._clock = PhaseClock(device)
        self.stats = DecoderStats()

    def generate(
        self,
        prompts: Iterable[Prompt],
        params: Params | None = None,
        *,
        on_output: Callable[[Output], None] | None = None,
    ) -> list[Output]:
        """Decode every prompt; returns outputs in the order of the prompts.

        Args:
            prompts: text, token ids, or mappings with ``"prompt"`` or ``"token_ids"``, an optional
                ``"id"``, and any sampling parameter of its own.
            params: for all prompts, or one per prompt; greedy by default.
            on_output: called with each output as it finishes.
        """
        outputs = []
        for output in self.stream(prompts, params):
            outputs.append(output)
            if on_output is not None:
                on_output(output)
        return sorted(outputs, key=lambda output: output.index)

    def stream(self, prompts: Iterable[Prompt], params: Params | None = None) -> Iterator[Output]:
        """Like ``generate``, yielding outputs as they finish.

        Prompts are read as rows fall free, so neither an endless iterator nor a huge file is
        held in memory. Closing the iterator abandons the sequences still running.
        """
        if len(self._batch):
            raise RuntimeError("expected an idle decoder, got one that is still streaming")
        requests = self.reader.read_all(prompts, params or SamplingParams())
        stats = self.stats = DecoderStats()
        start, exhausted = time.perf_counter(), False
        try:
            while True:
                if not exhausted and len(self._batch.free_rows) >= self._admission_size():
                    wanted = len(self._batch.free_rows)
                    group = list(islice(requests, wanted))
                    exhausted = len(group) < wanted
                    if group:
                        self._admit(group)
                elif len(self._batch):
                    self._round()
                elif exhausted:
                    return
                for sequence in self._release_finished():
                    stats.wall = time.perf_counter() - start
                    yield sequence.output()
        finally:
            self._release(self._batch.clear())

    def _admission_size(self) -> int:
        """Free rows worth a prefill.

        A prefill costs about a round, an idle row costs 1 / B of every round it waits; with L
        rounds per sequence the sum is least at B * sqrt(2 / L) rows at a time.
        """
        if not len(self._batch):
            return 1
        stats = self.stats
        rounds = stats.row_rounds / stats.sequences if stats.sequences else 64.0
        return max(1, int(self.max_batch_size * math.sqrt(2.0 / max(rounds, 2.0))))

    @torch.inference_mode()
    def _admit(self, requests: list[Request]) -> None:
        """Prefill prompts into free rows and draw their first tokens."""
        clock, batch, device = self._clock, self._batch, self.runner.device
        clock.start()
        host_rows = batch.take_rows(len(requests))
        sequences = [
            ActiveSequence(request, row, self.tokenizer)
            for request, row in zip(requests, host_rows, strict=True)
        ]
        ids = padded([request.prompt_ids for request in requests], device)
        rows = torch.tensor(host_rows, dtype=torch.int64, device=device)
        lengths = torch.tensor([len(r.prompt_ids) for r in requests], device=device)
        for sequence in sequences:
            request = sequence.request
            self.sampler.admit(sequence.row, request.params, request.prompt_ids, request.stop_ids)
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
        for sequence, token, values in zip(sequences, first.tolist(), logprobs, strict=True):
            sequence.extend([token], 0)
            sequence.logprobs.extend(values[:1])
        clock.mark("prefill")
        seconds = clock.stop()
        self.stats.seconds["prefill"] += seconds["prefill"] + seconds["draft"]
        expected = sum(self.stats.mean_output(sequence.remaining) for sequence in sequences)
        self.controller.admitted(expected, seconds["draft"])

    @torch.inference_mode()
    def _round(self) -> None:
        """One verify forward for every live row."""
        clock, batch, state = self._clock, self._batch, self._batch.state
        clock.start()
        longest = max(state.host_lengths)
        gamma = self._choose_gamma(sum(state.host_lengths) // len(batch))
        clock.mark("host")
        draft = self._propose(gamma) if gamma else None
        clock.mark("draft")
        gamma = draft.gamma if draft is not None else 0
        out, positions = self._verify(draft, longest + gamma)
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
        report = torch.cat([torch.stack([verdict.accepted, drafted], 1), verdict.tokens], 1)
        rows: list[list[int]] = report.tolist()  # the round's only device-to-host copy
        clock.mark("sample")
        self.drafter.commit(state, verdict, out.hidden)
        clock.mark("draft")
        logprobs = token_logprobs(self.sampler, batch.sequences, out.logits, probs, verdict.tokens)
        self._finish_round(gamma, verdict, rows, logprobs)

    def _propose(self, gamma: int) -> Draft | None:
        """A draft cut to what rows may still emit; ``None`` when no row has anything to verify.

        Both cuts look at nothing but lengths, which depend on the context only.
        """
        draft = self.drafter.propose(self._batch.state, gamma)
        return draft.limited([sequence.remaining - 1 for sequence in self._batch.sequences])

    def _verify(self, draft: Draft | None, max_position: int) -> tuple[ForwardOutput, Tensor]:
        state = self._batch.state
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

    def _finish_round(
        self,
        gamma: int,
        verdict: Verdict,
        rows: list[list[int]],
        logprobs: list[list[TokenLogprob]],
    ) -> None:
        """Host side of a commit: outputs, ends, statistics."""
        accepted, drafted = [row[0] for row in rows], [row[1] for row in rows]
        self._batch.advance(verdict, accepted)
        for sequence, row, own in zip(self._batch.sequences, rows, logprobs, strict=True):
            kept = row[0]
            sequence.extend(row[2 : kept + 3], kept)
            sequence.logprobs.extend(own[: kept + 1])
            sequence.stats.rounds += 1
            sequence.stats.accepted += kept
            sequence.stats.drafted += row[1]
        self._clock.mark("host")
        seconds = self._clock.stop()
        self.stats.observe(gamma, drafted, accepted, seconds)
        self.controller.observe(gamma, len(rows), drafted, accepted, seconds)

    def _choose_gamma(self, context: int) -> int:
        remaining = max(sequence.remaining for sequence in self._batch.sequences)
        return min(self.controller.choose(len(self._batch), context), remaining - 1)

    def _release_finished(self) -> list[ActiveSequence]:
        self.sampler.check()  # the tokens have just been waited for
        finished = self._batch.remove_finished()
        self._release([sequence.row for sequence in finished])
        self.stats.sequences += len(finished)
        self.stats.tokens += sum(len(sequence.token_ids) for sequence in finished)
        return finished

    def _release(self, rows: list[int]) -> None:
        if rows:
            self.drafter.release(rows)
        for row in rows:
            self.sampler.release(row)

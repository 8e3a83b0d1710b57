"""The decoder: requests go in, each step brings them tokens, finished ones leave their rows.

What a step does on the device is in ``rounds.py``.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from decoder.drafters import Drafter, DraftOptions
from decoder.drafters.table import checked_drafter
from decoder.errors import UserError
from decoder.gamma.base import DEFAULT_MAX_GAMMA, Controller
from decoder.model import loading
from decoder.model.kernels import AttentionName
from decoder.offload import Offload
from decoder.parallel.runner import target_runner
from decoder.requests.outputs import Output, Progress, failure, unread
from decoder.requests.params import SamplingParams
from decoder.requests.reader import NotYet, Params, Prompt, Read, Request, RequestReader
from decoder.requests.sequence import ActiveSequence
from decoder.sampling import Sampler
from decoder.sampling.sampler import VerifierName

from .metrics import DecoderStats
from .recovery import output_of
from .rounds import Rounds
from .settings import checked_length, loaded, make_controller, use_kernels
from .target import takes_target
from .turns import Turns


class SpeculativeDecoder:
    """Batched speculative decoding whose output is the target's own.

    Args:
        target: a transformers causal LM, loaded; ``from_paths`` loads one.
        drafter: who proposes tokens (``decoder.drafters.build_drafter`` makes one), or ``None``
            for plain autoregressive decoding.
        gamma: draft length, ``"auto"`` to choose it each round from measured costs and
            acceptance, or a ``Controller``.
        verifier: ``"standard"`` or ``"block"`` (output has the target's distribution), or
            ``"coupled"`` (output equals the target's own sampled output for the seed). Greedy
            output is the target's own under each.
        tokenizer: of the target; without one, prompts and outputs are token ids.
        max_batch_size: sequences decoded at once.
        max_length: longest prompt plus output; by default the model's context. Draft lengths have
            no part in it: a row drafts what it has room for.
        max_gamma: longest draft that ``"auto"`` considers.
        kernels: let ``moesd_kernels`` run what it can of the target.
        batch_invariant: on a GPU compute every row in one order whatever it is decoded beside, so
            that the target's bits do not depend on the batch; a CPU's kernels always do.
        attention: ``"auto"`` or ``"portable"``.
        static: steps in fixed-size buffers, on a GPU as CUDA graphs; ``"auto"``: where they can be.

    Raises:
        UserError: a path, a combination or an architecture that cannot work.
    """

    @takes_target
    def __init__(
        self,
        target: Any,
        drafter: Drafter | None = None,
        gamma: int | Literal["auto"] | Controller = "auto",
        verifier: VerifierName = "standard",
        *,
        tokenizer: Any = None,
        max_batch_size: int = 16,
        max_length: int | None = None,
        max_gamma: int = DEFAULT_MAX_GAMMA,
        kernels: bool = True,
        batch_invariant: bool = False,
        attention: AttentionName = "auto",
        static: bool | Literal["auto"] = "auto",
    ) -> None:
        if max_batch_size < 1:
            raise UserError(f"max_batch_size must be at least 1, got {max_batch_size}")
        use_kernels(target, kernels, batch_invariant)
        self.tokenizer = tokenizer
        self.drafter: Drafter = checked_drafter(drafter)
        self.controller = make_controller(gamma, max_gamma, self.drafter)
        self.max_batch_size = max_batch_size
        self.max_length = checked_length(target, max_length)
        # No row has room for a longer one.
        longest_draft = min(getattr(self.controller, "max_gamma", max_gamma), self.max_length)
        self.runner = target_runner(
            target, max_batch_size, self.max_length, attention, static, longest_draft
        )
        self.sampler = Sampler(max_batch_size, self.runner.vocab_size, self.runner.device, verifier)
        self.drafter.bind(self.runner, self.sampler, max(longest_draft, 1))
        self.reader = RequestReader(
            tokenizer, self.runner.vocab_size, self.max_length, loading.eos_ids(target)
        )
        self._rounds = Rounds(self.runner, self.drafter, self.sampler, longest_draft, tokenizer)
        self._waiting: deque[Request] = deque()
        self._added = itertools.count()
        self._turns = Turns()
        self.stats = DecoderStats.begun(self.runner.model)

    @classmethod
    def from_paths(
        cls,
        target: str | Path,
        draft: str | Path | None = None,
        *,
        drafter: str = "auto",
        draft_options: DraftOptions | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        experts: str | None = None,
        offload: Offload | None = None,
        kernels: bool = True,
        **options: Any,
    ) -> SpeculativeDecoder:
        """Load a target, its tokenizer and what drafts for it.

        Args:
            target, dtype, device, experts, offload: as for ``decoder.model.loading.load_model``.
            draft, drafter, draft_options: as for ``decoder.drafters.build_drafter``: by default
                what ``draft`` is, a model or an EAGLE head, and n-gram lookup without one.
            kernels, options: of the constructor; ``kernels`` counts for the draft as well.

        Raises:
            UserError: something that cannot be loaded, or does not go together.
        """
        told = replace(draft_options or DraftOptions(), kernels=kernels)
        parts = loaded(target, draft, drafter, told, dtype, device, experts, offload)
        return cls(*parts[:2], tokenizer=parts[2], kernels=kernels, **options)

    def add(self, prompt: Prompt | Request, params: SamplingParams | None = None) -> Request:
        """Queue a request; a later ``step`` starts it when enough rows are free.

        Args:
            prompt: text, token ids, or a mapping with ``"prompt"``, ``"token_ids"`` or a chat's
                ``"messages"``, perhaps ``"id"`` and sampling parameters; or one ``reader`` made.
            params: greedy by default; what a mapping says comes first, and a request has its own.

        Returns:
            The request, as ``step`` will report it and ``cancel`` takes it.

        Raises:
            UserError: what is wrong with the prompt.
            ValueError: the request is in the decoder already, or has parameters besides its own.
        """
        if not isinstance(prompt, Request):
            request = self.reader.read(next(self._added), prompt, params or SamplingParams())
        elif params is not None:
            raise ValueError("expected no params beside a request, which has its own")
        elif any(prompt is other for other in (*self._waiting, *self._rounds.batch.requests)):
            raise ValueError(f"request {prompt.index} is in the decoder already")
        else:
            request = self.reader.checked(prompt)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> Output | None:
        """Give a request up; its row is free for the next step. Waits for one on another thread.

        Returns:
            What it has so far, with finish reason ``"cancelled"``; ``None`` when it has none: it
            was waiting, or is no longer in the decoder.
        """
        with self._turns.lock:
            if request in self._waiting:
                self._waiting.remove(request)  # in place: another thread may be adding
            for sequence in (s for s in self._rounds.batch.sequences if s.request is request):
                sequence.finish_reason = "cancelled"
                self._rounds.drop([sequence])
                return output_of(sequence)
        return None

    def step(self) -> list[Progress]:
        """Start waiting requests when enough rows are free, else verify one draft of every row.

        What raises is tried again, and in the end costs the requests concerned only.

        Returns:
            What each sequence gained, ended ones with their output, whose ``error`` says why it
            failed if it did; empty when idle.
        """
        start = time.perf_counter()
        try:
            with self._turns.lock:
                return self._step()
        except BaseException:  # an interrupt, or what nothing helps against: hold nothing half done
            self.clear()
            raise
        finally:
            self.stats.wall += time.perf_counter() - start

    def _step(self) -> list[Progress]:
        batch = self._rounds.batch
        failed: list[ActiveSequence] = []
        if count := min(self._startable(), len(self._waiting)):
            group = [self._waiting.popleft() for _ in range(count)]
            failed = self._rounds.admit(group, self.controller, self.stats)
        elif len(batch):
            failed = self._rounds.verify(self.controller, self.stats)
        gained = [(sequence, sequence.take_new()) for sequence in (*batch.sequences, *failed)]
        finished = [sequence for sequence in batch.sequences if sequence.finish_reason is not None]
        self._rounds.drop(finished)
        self.stats.end([len(sequence.token_ids) for sequence in finished])
        return [
            Progress(sequence.request, new, output_of(sequence) if sequence.finish_reason else None)
            for sequence, new in gained
            if new or sequence.finish_reason
        ]

    def is_idle(self) -> bool:
        """Whether no request waits or runs, so that ``step`` would do nothing."""
        return not self._waiting and not len(self._rounds.batch)

    def clear(self) -> None:
        """Give up every request."""
        with self._turns.lock:
            self._waiting.clear()
            self._rounds.clear()

    def generate(
        self,
        prompts: Iterable[Prompt | Request],
        params: Params = None,
        *,
        on_output: Callable[[Output], None] | None = None,
    ) -> list[Output]:
        """Decode every prompt; returns outputs in the order of the prompts.

        Args:
            prompts: each as for ``add``; all are read before the first is decoded.
            params: for all prompts, or one per prompt; greedy by default. A request has its own.
            on_output: called with each output as it finishes.

        Raises:
            UserError: what is wrong with a prompt; nothing has been decoded.
            RequestFailed: some requests failed; it has the outputs of all.
        """
        requests = self.reader.read_each(prompts, params)
        place = {id(request): i for i, request in enumerate(requests)}
        found: dict[int, Output] = {}
        for request, output in self._decoded(iter(requests)):
            found[place.get(id(request), -1)] = output  # -1: somebody added it meanwhile
            if on_output is not None:
                on_output(output)
        outputs = [found[i] for i in sorted(found) if i >= 0]
        if (error := failure(outputs)) is not None:
            raise error
        return outputs

    def stream(
        self, prompts: Iterable[Prompt | Request | NotYet], params: Params = None
    ) -> Iterator[Output]:
        """Like ``generate``, yielding outputs as they finish, with ``error`` where one failed.

        Prompts are read as rows fall free; their iterator may be endless, or say ``NotYet()`` while
        others run. Closing the iterator abandons the sequences still running.
        """
        for _, output in self._decoded(self.reader.read_all(prompts, params)):
            yield output

    def _decoded(self, requests: Iterator[Read | NotYet]) -> Iterator[tuple[Read, Output]]:
        turn = self._turns.take(self.is_idle)
        self.stats = DecoderStats.begun(self.runner.model)
        more = True
        try:
            while more or not self.is_idle():
                while more and len(self._waiting) < self._startable():
                    request = next(requests, None)
                    more = request is not None
                    if request is None or isinstance(request, NotYet):
                        break
                    if not isinstance(request, Request):
                        yield request, unread(request)
                    else:
                        with self._turns.within(turn):
                            self.add(request)
                with self._turns.lock:
                    if not more and not self._turns.is_latest(turn):
                        break  # all of these have ended, and what is here is another caller's
                    with self._turns.within(turn):
                        steps = self.step()
                for progress in steps:
                    if progress.output is not None:
                        yield progress.request, progress.output
        finally:
            with self._turns.lock:
                if self._turns.is_latest(turn):
                    self.clear()

    def _startable(self) -> int:
        """Requests that the next step could start."""
        return self._rounds.batch.startable(self.stats.mean_rounds(64.0))

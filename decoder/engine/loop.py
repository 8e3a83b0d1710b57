"""The decoder: requests go in, each step brings them tokens, finished ones leave their rows.

What a step does on the device is in ``rounds.py``.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from decoder.drafters import Drafter, DraftOptions, build_drafter
from decoder.drafters.table import checked_drafter
from decoder.errors import UserError
from decoder.gamma.base import DEFAULT_MAX_GAMMA, Controller
from decoder.model.kernels import AttentionName, accelerate
from decoder.model.loading import (
    eos_ids,
    load_model,
    load_tokenizer,
    require_fitting_tokenizer,
)
from decoder.model.runner import ModelRunner
from decoder.requests.outputs import Output, Progress
from decoder.requests.params import SamplingParams
from decoder.requests.reader import Prompt, Request, RequestReader
from decoder.requests.sequence import ActiveSequence
from decoder.sampling import Sampler
from decoder.sampling.sampler import VerifierName

from .metrics import DecoderStats
from .rounds import Rounds
from .settings import checked_length, make_controller
from .target import takes_target

Params = SamplingParams | Sequence[SamplingParams]


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
        max_length: longest prompt plus output; by default the model's context.
        max_gamma: longest draft that ``"auto"`` considers.
        kernels: let ``moesd_kernels`` run what it can of the target.
        attention: ``"auto"`` or ``"portable"``.
        static: run steps in fixed-size buffers, as CUDA graphs on a GPU; ``"auto"`` does so there.

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
        attention: AttentionName = "auto",
        static: bool | Literal["auto"] = "auto",
    ) -> None:
        if max_batch_size < 1:
            raise UserError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if kernels:
            accelerate(target)
        self.tokenizer = tokenizer
        self.drafter: Drafter = checked_drafter(drafter)
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
        self._rounds = Rounds(self.runner, self.drafter, self.sampler, width, tokenizer)
        self._waiting: deque[Request] = deque()
        self._added = itertools.count()
        self.stats = DecoderStats()

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
        kernels: bool = True,
        **options: Any,
    ) -> SpeculativeDecoder:
        """Load a target, its tokenizer and what drafts for it.

        Args:
            target, dtype, device, experts: as for ``decoder.model.loading.load_model``.
            draft, drafter, draft_options: as for ``decoder.drafters.build_drafter``: by default
                what ``draft`` is, a model or an EAGLE head, and n-gram lookup without one.
            kernels: let ``moesd_kernels`` run what it can of target and draft.
            options: of the constructor.

        Raises:
            UserError: something that cannot be loaded, or does not go together.
        """
        model = load_model(target, dtype=dtype, device=device, experts=experts)
        tokenizer = load_tokenizer(target)
        require_fitting_tokenizer(tokenizer, model)
        told = replace(draft_options or DraftOptions(), kernels=kernels, tokenizer=tokenizer)
        made = build_drafter(drafter, model, draft, told)
        return cls(model, made, tokenizer=tokenizer, kernels=kernels, **options)

    def add(self, prompt: Prompt | Request, params: SamplingParams | None = None) -> Request:
        """Queue a request; a later ``step`` starts it when enough rows are free.

        Args:
            prompt: text, token ids, or a mapping with ``"prompt"`` or ``"token_ids"``, an optional
                ``"id"``, and any sampling parameter of its own; or a request that ``reader`` made.
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
        elif any(request is prompt for request in self._requests()):
            raise ValueError(f"request {prompt.index} is in the decoder already")
        else:
            request = prompt
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> Output | None:
        """Give a request up; its row is free for the next step.

        Returns:
            What it has so far, with finish reason ``"cancelled"``; ``None`` when it has none: it
            was waiting, or is no longer in the decoder.
        """
        for sequence in self._rounds.batch.sequences:
            if sequence.request is request:
                sequence.finish_reason = "cancelled"
                self._rounds.drop([sequence])
                return sequence.output()
        self._waiting = deque(waiting for waiting in self._waiting if waiting is not request)
        return None

    def step(self) -> list[Progress]:
        """Start waiting requests when enough rows are free, else verify one draft of every row.

        Returns:
            What each sequence gained, finished ones with their output; empty when idle.

        Raises:
            FloatingPointError: logits that define no distribution; ``clear`` the decoder then.
        """
        start = time.perf_counter()
        batch = self._rounds.batch
        count = min(self._startable(), len(self._waiting))
        if count:
            group = [self._waiting.popleft() for _ in range(count)]
            self._rounds.admit(group, self.controller, self.stats)
        elif len(batch):
            self._rounds.verify(self.controller, self.stats)
        gained = [(sequence, sequence.take_new()) for sequence in batch.sequences]
        finished = [sequence for sequence in batch.sequences if sequence.finish_reason is not None]
        self._rounds.drop(finished)
        self.stats.sequences += len(finished)
        self.stats.tokens += sum(len(sequence.token_ids) for sequence in finished)
        self.stats.wall += time.perf_counter() - start
        return [_progress(sequence, token_ids) for sequence, token_ids in gained if token_ids]

    def is_idle(self) -> bool:
        """Whether no request waits or runs, so that ``step`` would do nothing."""
        return not self._waiting and not len(self._rounds.batch)

    def clear(self) -> None:
        """Give up every request."""
        self._waiting.clear()
        self._rounds.clear()

    def generate(
        self,
        prompts: Iterable[Prompt],
        params: Params | None = None,
        *,
        on_output: Callable[[Output], None] | None = None,
    ) -> list[Output]:
        """Decode every prompt; returns outputs in the order of the prompts.

        Args:
            prompts: each as for ``add``.
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
        if not self.is_idle():
            raise RuntimeError("expected an idle decoder, got one that is still streaming")
        requests = self.reader.read_all(prompts, params or SamplingParams())
        self.stats = DecoderStats()
        try:
            while True:
                for request in itertools.islice(requests, self._startable()):
                    self.add(request)
                if self.is_idle():
                    return
                for progress in self.step():
                    if progress.output is not None:
                        yield progress.output
        finally:
            self.clear()

    def _requests(self) -> Iterator[Request]:
        yield from self._waiting
        yield from (sequence.request for sequence in self._rounds.batch.sequences)

    def _startable(self) -> int:
        """Requests that the next step could start: every free row, or none while they are few.

        A prefill costs about a round, an idle row costs 1 / B of every round it waits; with L
        rounds per sequence the sum is least at B * sqrt(2 / L) rows at a time.
        """
        batch, stats = self._rounds.batch, self.stats
        free = len(batch.free_rows)
        if not len(batch):
            return free
        rounds = stats.row_rounds / stats.sequences if stats.sequences else 64.0
        enough = max(1, int(self.max_batch_size * math.sqrt(2.0 / max(rounds, 2.0))))
        return free if free >= enough else 0


def _progress(sequence: ActiveSequence, token_ids: list[int]) -> Progress:
    output = sequence.output() if sequence.finish_reason is not None else None
    return Progress(sequence.request, token_ids, output)

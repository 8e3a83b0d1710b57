"""The function that ``generate`` runs in the place of its own loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from decoder.drafters import DraftOptions, build_drafter
from decoder.engine.loop import SpeculativeDecoder
from decoder.errors import UserError
from decoder.requests.outputs import Output, failure
from decoder.requests.params import SamplingParams
from decoder.requests.reader import Request

from . import arguments, processors
from .lockstep import EOS_TOKEN, MAX_LENGTH, Lockstep, of_kind


def speculative(
    drafter: Any = "ngram", gamma: Any = "auto", **options: Any
) -> Callable[..., Tensor | GenerateDecoderOnlyOutput]:
    """A function for ``generate(custom_generate=...)``.

    What it returns is what ``generate`` returns: greedy output token for token, sampled output in
    distribution, drawn from torch's global generator. Logits processors see the prefix of each
    position, stopping criteria and a streamer each token of the whole batch once. A logits
    processor of one's own must say that its scores for a row depend on that row's ``input_ids`` and
    ``scores`` alone, by an attribute ``is_prefix_function = True``; it is called for one row at a
    time, perhaps more than once for a position and for drafts that are then thrown away. Stop
    strings are given as a ``StopStringCriteria``, because ``generate`` keeps the tokenizer from its
    custom methods. ``past_key_values`` is ``None`` in what ``return_dict_in_generate`` returns.

    Args:
        drafter: as for ``build_drafter``: a name, a draft model, a ``Drafter``.
        gamma, options: as in ``SpeculativeDecoder``. One decoder is kept for later calls: that of
            the last model, with rows for the largest batch so far.
    """
    return _Method(drafter, gamma, options)


class _Method:
    """Stands where transformers has ``GenerationMixin._sample``, and is called like it."""

    def __init__(self, drafter: Any, gamma: Any, options: dict[str, Any]) -> None:
        self._drafter, self._gamma, self._options = drafter, gamma, options
        self._decoder: SpeculativeDecoder | None = None
        self._lock = threading.Lock()

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """One call at a time, of whichever thread: there is one decoder.

        Raises:
            RuntimeError: another has not ended.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("expected a method that is not generating, got one that is")
        try:
            return self._generate(model, *args, **kwargs)
        finally:
            self._lock.release()

    def _generate(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        given = arguments.keywords()
        arguments.check(generation_config, given, inputs)
        processors.check(logits_processor)
        prompts = arguments.prompts(input_ids, inputs)
        pad = generation_config._pad_token_tensor
        pad_id = None if pad is None else int(pad)
        lockstep = Lockstep(input_ids, stopping_criteria, given.get("streamer"), pad_id)
        decoder = self._decoder_of(model, len(prompts))
        requests = _requests(
            decoder, input_ids, prompts, logits_processor, stopping_criteria, generation_config
        )
        try:
            _decode(decoder, requests, lockstep)
        finally:
            decoder.clear()
        sequences: Any = lockstep.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    def _decoder_of(self, model: Any, rows: int) -> SpeculativeDecoder:
        rows = self._options.get("max_batch_size", rows)
        kept = self._decoder
        if kept is not None and kept.runner.model is model and kept.max_batch_size >= rows:
            return kept
        self._decoder = kept = None  # before the next one takes its memory
        told = DraftOptions(kernels=self._options.get("kernels", True))
        made = build_drafter(self._drafter, model, options=told)
        self._decoder = SpeculativeDecoder(
            model, made, self._gamma, **{**self._options, "max_batch_size": rows}
        )
        return self._decoder


def _requests(
    decoder: SpeculativeDecoder,
    input_ids: Tensor,
    prompts: list[list[int]],
    logits_processor: Any,
    criteria: Any,
    config: Any,
) -> list[Request]:
    """One request per row, which ends where ``MaxLengthCriteria`` and ``EosTokenCriteria`` do."""
    rows, width = input_ids.shape
    end_ids = frozenset(
        token
        for criterion in of_kind(criteria, EOS_TOKEN)
        for token in criterion.eos_token_id.tolist()
    )
    longest = min(criterion.max_length for criterion in of_kind(criteria, MAX_LENGTH))
    common = {
        # The first token is generated whatever the criteria say of the prompt.
        "max_new_tokens": max(1, longest - width),
        "stop_token_ids": tuple(i for i in end_ids if 0 <= i < decoder.runner.vocab_size),
        "ignore_eos": True,
    }
    padding = [width - len(prompt) for prompt in prompts]
    sampling = bool(config.do_sample)
    params = processors.sampling_params(logits_processor, sampling, width, padding, end_ids, common)
    ours = params is None
    params = params or SamplingParams(**common, temperature=1.0 if sampling else 0.0)
    # Each row draws its own noise, as rows of a batch do in transformers.
    requests = [decoder.reader.read(row, prompt, params) for row, prompt in enumerate(prompts)]
    if ours:
        for row, request in enumerate(requests):
            request.process = processors.RowProcessors(logits_processor, input_ids[row], row, rows)
    return requests


def _decode(decoder: SpeculativeDecoder, requests: list[Request], lockstep: Lockstep) -> None:
    """Decode until every row is done.

    Raises:
        RequestFailed: rows have failed before they were done.
        UserError: a row has come to the end of the context.
    """
    for request in requests:
        decoder.add(request)
    outputs: list[Output] = []
    while not decoder.is_idle() and not lockstep.done:
        for progress in decoder.step():
            lockstep.take(progress.request.index, progress.token_ids)
            if progress.output is not None:
                outputs.append(progress.output)
        for row in lockstep.advance():
            decoder.cancel(requests[row])
    if lockstep.done:
        return
    if (error := failure(sorted(outputs, key=lambda output: output.index))) is not None:
        raise error
    for output in outputs:
        asked, done = requests[output.index].params.max_new_tokens, len(output.token_ids)
        if output.finish_reason == "length" and done < asked:
            raise UserError(
                f"row {output.index} has come to the end of the decoder's max_length of "
                f"{decoder.max_length} after {done} of {asked} new tokens"
            )

"""One request on the host: its prompt, what it has emitted, and when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decoder.errors import UserError

from .outputs import Output, SequenceStats, TokenLogprob
from .params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(slots=True)
class Request:
    """A prompt, tokenized and checked, before it gets a row."""

    index: int
    id: Any
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    max_new_tokens: int


class RequestReader:
    """Turns prompts of any accepted form into requests.

    Args:
        tokenizer: needed for text prompts, stop strings and text output; may be ``None``.
        vocab_size: ids must be below it.
        max_length: prompt and output together.
        eos_ids: end-of-sequence ids of the model.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, max_length: int, eos_ids: frozenset[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.eos_ids = eos_ids

    def read_all(
        self, prompts: Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> Iterator[Request]:
        """Check prompts one by one, as they are asked for.

        Args:
            params: for all prompts, or one per prompt.
        """
        if isinstance(prompts, (str, bytes)):
            raise TypeError("prompts must be an iterable of prompts, got a single string")
        for index, prompt in enumerate(prompts):
            if isinstance(params, SamplingParams):
                own = params
            elif index < len(params):
                own = params[index]
            else:
                raise UserError(f"expected one SamplingParams per prompt, got {len(params)}")
            yield self.read(index, prompt, own)

    def read(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        """Check one prompt.

        Args:
            prompt: text, token ids, or a mapping with ``"prompt"`` or ``"token_ids"``, an optional
                ``"id"`` and any field of ``SamplingParams``.

        Raises:
            UserError: what is wrong with it, naming it by ``id`` or index.
        """
        name = f"prompt {index}"
        request_id = None
        if isinstance(prompt, Mapping):
            fields = dict(prompt)
            request_id = fields.pop("id", None)
            name = f"prompt {index if request_id is None else request_id!r}"
            text, ids = fields.pop("prompt", None), fields.pop("token_ids", None)
            if (text is None) == (ids is None):
                raise UserError(f'{name}: expected exactly one of "prompt" and "token_ids"')
            try:
                params = params.updated(fields)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            prompt = ids if text is None else text
        text = prompt if isinstance(prompt, str) else None
        ids = self._ids(prompt, name)
        if params.stop and self.tokenizer is None:
            raise UserError(f"{name}: stop strings need a tokenizer, got none")
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.eos_ids
        room = self.max_length - len(ids)
        new_tokens = min(params.max_new_tokens, room)
        return Request(index, request_id, text, ids, params, stop_ids, new_tokens)

    def _ids(self, prompt: Any, name: str) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"{name}: a text prompt needs a tokenizer, got none")
            ids = list(self.tokenizer(prompt)["input_ids"])
        else:
            try:
                ids = [int(token) for token in prompt]
            except (TypeError, ValueError):
                raise UserError(
                    f"{name}: expected text or a list of token ids, got {type(prompt).__name__}"
                ) from None
        if not ids:
            raise UserError(f"{name}: expected at least one token, got an empty prompt")
        if not all(0 <= token < self.vocab_size for token in ids):
            bad = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise UserError(f"{name}: token ids must be in [0, {self.vocab_size}), got {bad}")
        if len(ids) >= self.max_length:
            raise UserError(
                f"{name}: {len(ids)} tokens leave no room in a context of {self.max_length}; "
                f"expected at most {self.max_length - 1}"
            )
        return ids


class ActiveSequence:
    """A request in its row: the tokens it has emitted, and when they end it."""

    __slots__ = (
        "_tokenizer",
        "drafted",
        "finish_reason",
        "logprobs",
        "request",
        "row",
        "stats",
        "text_end",
        "token_ids",
    )

    def __init__(self, request: Request, row: int, tokenizer: Any) -> None:
        self.request = request
        self.row = row
        self.token_ids: list[int] = []
        self.drafted: list[bool] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.text_end: int | None = None
        self.stats = SequenceStats(len(request.prompt_ids))
        self._tokenizer = tokenizer

    @property
    def remaining(self) -> int:
        """Tokens it may still emit."""
        return self.request.max_new_tokens - len(self.token_ids)

    def extend(self, tokens: Sequence[int], accepted: int) -> int:
        """Take over a round's tokens up to the one that ends the sequence.

        The cut comes after acceptance and stop conditions beat the length limit, so it cannot
        bias what is emitted.

        Args:
            tokens: emitted this round; the first ``accepted`` were drafts.

        Returns:
            How many were taken; fewer than given when the sequence ended.
        """
        stop_ids, limit = self.request.stop_ids, self.remaining
        taken = min(len(tokens), limit)
        for i in range(taken):
            if tokens[i] in stop_ids:
                taken = i + 1
                is_stop = tokens[i] in self.request.params.stop_token_ids
                self.finish_reason = "stop" if is_stop else "eos"
                break
        first = len(self.token_ids)
        self.token_ids.extend(tokens[:taken])
        if self.request.params.stop:
            kept = self._cut_at_stop_string(first)
            if kept is not None:
                taken, self.finish_reason = kept - first, "stop"
                del self.token_ids[kept:]
        self.drafted.extend(i < accepted for i in range(taken))
        if self.finish_reason is None and taken == limit:
            self.finish_reason = "length"
        return taken

    def output(self) -> Output:
        """The finished sequence."""
        text = self._decode(self.token_ids)[: self.text_end] if self._tokenizer is not None else ""
        wants_logprobs = self.request.params.logprobs is not None
        return Output(
            self.request.index,
            self.request.id,
            self.request.prompt,
            self.token_ids,
            text,
            self.finish_reason or "length",
            self.stats,
            self.drafted,
            self.logprobs[: len(self.token_ids)] if wants_logprobs else None,
        )

    def _cut_at_stop_string(self, first: int) -> int | None:
        """Number of tokens up to the one completing a stop string; sets where the text ends."""
        stops = self.request.params.stop
        # A character takes at most four bytes and a token at least one, so a stop string that ends
        # in the new tokens begins within this many tokens before them.
        start = max(0, first - 4 * max(map(len, stops)) - 4)
        if not any(stop in self._decode(self.token_ids[start:]) for stop in stops):
            return None
        for end in range(first + 1, len(self.token_ids) + 1):
            if any(stop in self._decode(self.token_ids[start:end]) for stop in stops):
                text = self._decode(self.token_ids[:end])
                found = [text.find(stop) for stop in stops]
                self.text_end = min((at for at in found if at >= 0), default=None)
                return end if self.text_end is not None else None
        return None

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

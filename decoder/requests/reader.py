"""Prompts of any accepted form, read into checked requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from decoder.errors import UserError

from .params import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, tokenized and checked; two are the same only if they are one object.

    Attributes:
        index: of its prompt, counted from 0 in the order of the prompts.
        id: the caller's name for it, or ``None``.
        prompt: its text, when it was given as text.
        prompt_ids: its tokens, at least one.
        params: how its tokens are chosen.
        stop_ids: tokens that end it: the model's own and ``stop_token_ids``.
        max_new_tokens: what it asks for, or what its prompt leaves of the longest row.
    """

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

"""Prompts of any accepted form, read into checked requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from decoder.errors import UserError, explained, reason

from .chat import CHAT_KEYS, FORMS, Chat, prompt_form
from .params import SamplingParams, shown, whole

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, tokenized and checked; two are the same only if they are one object.

    Attributes:
        index: of its prompt, counted from 0 in the order of the prompts.
        id: the caller's name for it, or ``None``.
        prompt: its text, when it was given as text; of a chat, as its template renders it.
        prompt_ids: its tokens, at least one.
        params: how its tokens are chosen; with a seed where they are sampled.
        stop_ids: tokens that end it: the model's own and ``stop_token_ids``, of the vocabulary.
        max_new_tokens: what it asks for, or what its prompt leaves of the longest row.
        process: what else is done to the target's logits (``decoder.sampling.processors``).
    """

    index: int
    id: Any
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    max_new_tokens: int
    process: Callable[[Sequence[int], Any], Any] | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return prompt_name(self.index, self.id)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A prompt that is no request.

    Attributes:
        index, id, prompt: as of a request, as far as they could be read.
        error: what is wrong with it, naming it.
    """

    index: int
    id: Any
    prompt: str | None
    error: UserError


class NotYet:
    """An item of prompts that come one by one: there is none yet, and what runs may go on."""


Read = Request | Unreadable
Params = SamplingParams | Sequence[SamplingParams] | None


class RequestReader:
    """Turns prompts of any accepted form into requests.

    Args:
        tokenizer: needed for text prompts, chats, stop strings and text output; may be ``None``.
        vocab_size: ids must be below it.
        max_length: prompt and output together.
        eos_ids: end-of-sequence ids of the model; the tokenizer's own counts as well, because chat
            models come with one that their configuration forgot.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, max_length: int, eos_ids: frozenset[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_length = max_length
        own = getattr(tokenizer, "eos_token_id", None)
        self.eos_ids = eos_ids if own is None else eos_ids | {own}

    def read_all(
        self, prompts: Iterable[Prompt | Request | NotYet], params: Params = None
    ) -> Iterator[Read | NotYet]:
        """Check prompts one by one, as they are asked for; one that is wrong stops no other.

        Args:
            prompts: as for ``read``, or requests read before.
            params: for all prompts, or one per prompt; greedy by default.
        """
        if isinstance(prompts, (str, bytes, Mapping)):
            what = "mapping" if isinstance(prompts, Mapping) else "string"
            raise TypeError(f"prompts must be an iterable of prompts, got a single {what}")
        index = 0
        for prompt in prompts:
            if isinstance(prompt, NotYet):
                yield prompt
                continue
            try:
                if isinstance(prompt, Request):
                    yield self.checked(prompt)
                else:
                    yield self.read(index, prompt, _own(params, index))
            except Exception as error:
                request_id, text = _identity(prompt)
                name = prompt_name(index, request_id)
                if not isinstance(error, UserError):
                    error = UserError(f"{name}: {reason(error)}")
                yield Unreadable(index, request_id, text, error)
            index += 1

    def read_each(
        self, prompts: Iterable[Prompt | Request], params: Params = None
    ) -> list[Request]:
        """``read_all`` to its end.

        Raises:
            UserError: what is wrong with a prompt, or that there are not as many ``params``.
        """
        requests = []
        for request in self.read_all(prompts, params):
            if isinstance(request, Unreadable):
                raise request.error
            if isinstance(request, Request):
                requests.append(request)
        if len({id(request) for request in requests}) < len(requests):
            raise UserError("expected every request once, got one of them again")
        if isinstance(params, Sequence) and len(params) != len(requests):
            raise UserError(
                f"expected one SamplingParams per prompt, got {len(params)} for {len(requests)}"
            )
        return requests

    def read(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        """Check one prompt.

        Args:
            prompt: text, token ids, or a mapping with ``"prompt"``, ``"token_ids"`` or
                ``"messages"`` (and what else ``decoder.requests.chat`` reads beside it), an
                optional ``"id"`` and any field of ``SamplingParams``.

        Raises:
            UserError: what is wrong with it, naming it by ``id`` or index.
        """
        request_id, text = _identity(prompt)
        name = prompt_name(index, request_id)
        if isinstance(prompt, Mapping):
            try:
                prompt, changes = _opened(prompt)
                params = params.updated(changes)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
        templated = isinstance(prompt, Chat)
        if isinstance(prompt, Chat):
            prompt = self._rendered(prompt, name)
        text = prompt if isinstance(prompt, str) else None
        # A template writes special tokens, begin-of-text among them, by itself.
        ids = self._ids(prompt, name, add_special_tokens=not templated)
        stop_ids = self._stop_ids(params)
        self._check(params, stop_ids, name)
        if params.seed is None and not params.greedy:
            # Unseeded requests differ, and follow torch.manual_seed.
            params = replace(params, seed=int(torch.randint(2**63 - 1, ())))
        new_tokens = min(params.max_new_tokens, self.max_length - len(ids))
        return Request(index, request_id, text, ids, params, stop_ids, new_tokens)

    def checked(self, request: Request) -> Request:
        """A request that may have been read elsewhere, or changed.

        Raises:
            UserError: it does not fit here.
        """
        longest = self.max_length - len(request.prompt_ids)
        if not 1 <= request.max_new_tokens <= longest:
            raise UserError(
                f"{request.name}: expected 1 to {longest} new tokens after a prompt of "
                f"{len(request.prompt_ids)}, got {request.max_new_tokens}"
            )
        ids = request.prompt_ids
        if min(ids, default=-1) < 0 or max(ids) >= self.vocab_size:
            raise UserError(f"{request.name}: expected token ids below {self.vocab_size}")
        return request

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Ids that can end the request: no model emits one from outside its vocabulary."""
        ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            ids |= self.eos_ids
        return frozenset(i for i in ids if 0 <= i < self.vocab_size)

    def _check(self, params: SamplingParams, stop_ids: frozenset[int], name: str) -> None:
        """What can be known to be impossible before a token is decoded."""
        if params.stop and self.tokenizer is None:
            raise UserError(f"{name}: stop strings need a tokenizer, got none")
        if params.logprobs is not None and params.logprobs > self.vocab_size:
            raise UserError(
                f"{name}: logprobs must be at most the vocabulary's {self.vocab_size}, "
                f"got {shown(params.logprobs)}"
            )
        bias = params.logit_bias or {}
        outside = [token for token in bias if not 0 <= token < self.vocab_size]
        if outside:
            raise UserError(
                f"{name}: logit_bias ids must be in [0, {self.vocab_size}), got {shown(outside[0])}"
            )
        banned = {token for token, value in bias.items() if value == -math.inf}
        if params.min_new_tokens:
            banned |= stop_ids
        if len(banned) == self.vocab_size:
            raise UserError(
                f"{name}: expected a token that may be emitted, got every token banned by "
                "logit_bias and min_new_tokens"
            )

    def _rendered(self, chat: Chat, name: str) -> str:
        if self.tokenizer is None:
            raise UserError(f"{name}: messages need a tokenizer, got none")
        with explained(f"{name}: the chat template cannot be applied"):
            return chat.rendered(self.tokenizer)

    def _ids(self, prompt: Any, name: str, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"{name}: a text prompt needs a tokenizer, got none")
            options = {} if add_special_tokens else {"add_special_tokens": False}
            with explained(f"{name}: cannot be tokenized"):
                ids = list(self.tokenizer(prompt, **options)["input_ids"])
        else:
            ids = _token_ids(prompt, name)
        if not ids:
            raise UserError(f"{name}: expected at least one token, got an empty prompt")
        if not all(0 <= token < self.vocab_size for token in ids):
            bad = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise UserError(
                f"{name}: token ids must be in [0, {self.vocab_size}), got {shown(bad)}"
            )
        if len(ids) >= self.max_length:
            raise UserError(
                f"{name}: {len(ids)} tokens leave no room in a context of {self.max_length}; "
                f"expected at most {self.max_length - 1}"
            )
        return ids


def prompt_name(index: int, request_id: Any) -> str:
    """What messages call a prompt."""
    return f"prompt {index if request_id is None else shown(request_id)}"


def _own(params: Params, index: int) -> SamplingParams:
    if params is None:
        return SamplingParams()
    if isinstance(params, SamplingParams):
        return params
    if not isinstance(params, Sequence):
        raise TypeError(f"params must be SamplingParams, got {type(params).__name__}")
    if index >= len(params):
        raise UserError(f"expected one SamplingParams per prompt, got {len(params)}")
    return params[index]


def _opened(prompt: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The text, the token ids or the chat of a mapping, and its sampling parameters."""
    form = prompt_form(prompt)
    changes = {k: v for k, v in prompt.items() if k not in ("id", *FORMS, *CHAT_KEYS)}
    return Chat.read(prompt) if form == "messages" else prompt[form], changes


def _identity(prompt: Any) -> tuple[Any, str | None]:
    """The caller's name of a prompt, and its text when it is one."""
    request_id, text = None, prompt
    if isinstance(prompt, Mapping):
        request_id, text = prompt.get("id"), prompt.get("prompt")
    return request_id, text if isinstance(text, str) else None


def _token_ids(prompt: Any, name: str) -> list[int]:
    expected = f"{name}: expected text or a list of token ids, got"
    items = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(items, (bytes, bytearray, set, frozenset, Mapping)):
        raise UserError(f"{expected} {type(prompt).__name__}")
    try:
        read = [(whole(item), item) for item in items]
    except TypeError:
        raise UserError(f"{expected} {type(prompt).__name__}") from None
    for token, item in read:
        if token is None:
            raise UserError(f"{expected} {shown(item)} in it")
    return [token for token, _ in read if token is not None]

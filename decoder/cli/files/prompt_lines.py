"""One line of a prompt file: which keys it may have, and what each of them may be.

Values of sampling parameters are checked by ``SamplingParams``, for lines and flags alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from decoder.errors import UserError
from decoder.requests.chat import CHAT_KEYS, FORMS, Chat, prompt_form
from decoder.requests.params import SamplingParams, shown

from .strict_json import kind, parse_object, unknown_key

_PARAMETERS = frozenset(field.name for field in fields(SamplingParams))
_PROMPT = dict.fromkeys([*FORMS, *CHAT_KEYS])  # in order, each once
_OWN = (*_PROMPT, "id", "task_id", "metadata")
# What well-known data sets have beside their prompts. Of no use here, but for the first of turns,
# and no mistake either.
_IGNORED = {
    "HumanEval": ("canonical_solution", "entry_point", "test"),
    "HumanEval+": ("atol", "base_input", "contract", "plus_input"),
    "MBPP": (
        "challenge_test_list", "code", "source_file", "test_imports", "test_list",
        "test_setup_code", "text",
    ),
    "MT-bench": ("category", "question_id", "reference", "turns"),
}  # fmt: skip
_KNOWN = _PARAMETERS.union(_OWN, *_IGNORED.values())
_NESTED = ("metadata", *CHAT_KEYS)
_DEEPEST = 32  # levels of these: digests, results and templates write them by recursion


@dataclass(frozen=True, slots=True)
class LineId:
    """What identifies a prompt, and what its result repeats of it.

    Attributes:
        index: its number, counted from 0; lines without anything do not count.
        name: what its line calls it, or ``None``.
        digest: of what decides its result: the prompt and parameters of its own.
        metadata: what its line says beside that, for the reader of the results.
    """

    index: int
    name: str | int | None = None
    digest: str | None = field(default=None, compare=False)
    metadata: Any = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"{self.index + 1}" if self.name is None else f"{self.index + 1} ({self.name})"


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that holds no prompt, and why not."""

    id: LineId
    reason: str


def parse_line(line: bytes, source: str, index: int) -> dict[str, Any] | BadLine:
    """The prompt of a line, as ``SpeculativeDecoder.add`` takes it; its ``"id"`` is a ``LineId``.

    Args:
        source: file and line number, for messages.
        index: number of the prompt.
    """
    line_id = LineId(index)
    try:
        values = parse_object(line.decode())
        line_id = LineId(index, _name(values))
        return _prompt(values, index)
    except UnicodeDecodeError as error:
        reason = f"expected UTF-8, got byte 0x{line[error.start]:02x} at column {error.start + 1}"
    except ValueError as error:
        reason = str(error)
    return BadLine(line_id, f"{source}: {reason}")


def checked(item: dict[str, Any] | BadLine) -> dict[str, Any]:
    """The prompt.

    Raises:
        UserError: there is none, and why.
    """
    if isinstance(item, BadLine):
        raise UserError(item.reason)
    return item


def digest(prompt: Mapping[str, Any]) -> str:
    """Of a prompt and parameters of its own; not of flags, which are the same for all."""
    text = json.dumps(prompt, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _prompt(values: dict[str, Any], index: int) -> dict[str, Any]:
    _check_keys(values)
    # Null says nothing, as if the key were not there.
    given = _with_first_turn({key: value for key, value in values.items() if value is not None})
    for key in _NESTED:
        if _is_deeper(given.get(key), _DEEPEST):
            raise ValueError(f'"{key}" must not be nested more than {_DEEPEST} levels')
    form = prompt_form(given)
    if form == "messages":
        Chat.read(given)
    elif form == "token_ids":
        _check_ids(given[form])
    elif not isinstance(given[form], str):
        raise ValueError(f'"prompt" must be text, got {kind(given[form])}')
    parameters = {key: value for key, value in given.items() if key in _PARAMETERS}
    SamplingParams().updated(parameters)
    prompt = {key: value for key, value in given.items() if key in _PROMPT} | parameters
    line_id = LineId(index, _name(values), digest(prompt), given.get("metadata"))
    return {**prompt, "id": line_id}


def _with_first_turn(given: dict[str, Any]) -> dict[str, Any]:
    """MT-bench's first question as the prompt; the next would need the answer to it."""
    match given:
        case {"turns": [str(first), *_]} if not any(form in given for form in FORMS):
            return {**given, "prompt": first}
    return given


def _check_keys(values: dict[str, Any]) -> None:
    for key in values:
        if key not in _KNOWN:
            summary = f"{', '.join(_OWN)} and sampling parameters"
            raise ValueError(unknown_key(key, _KNOWN, summary))


def _check_ids(ids: Any) -> None:
    if not isinstance(ids, list):
        raise ValueError(f'"token_ids" must be a list of integers, got {kind(ids)}')
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < 2**31:
            got = shown(token) if type(token) is int else kind(token)
            raise ValueError(
                f'"token_ids" must be a list of integers in [0, 2**31), got {got} at {place}'
            )
    if not ids:
        raise ValueError('"token_ids" must have at least one token, got none')


def _name(values: dict[str, Any]) -> str | int | None:
    for key in ("id", "task_id"):
        name = values.get(key)
        if name is not None:
            if type(name) is not str and type(name) is not int:
                raise ValueError(f'"{key}" must be text or an integer, got {kind(name)}')
            return name
    return None


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and (
        levels == 0 or any(_is_deeper(item, levels - 1) for item in value)
    )

"""JSON in which a mistake is refused: a key twice, a number that is none, half a character."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection
from typing import Any, NoReturn

from decoder.requests.params import shown


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that ``text`` is.

    Raises:
        ValueError: what was expected and what came, on one line.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refused, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("expected a JSON object, got one nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"expected a JSON object, got {shown(text.strip())} ({error.msg}, column {error.colno})"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {kind(value)}")
    if not text.isascii() or "\\u" in text:
        _check_characters(value)
    return value


def kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "text", int: "an integer", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]


def unknown_key(key: str, known: Collection[str], summary: str) -> str:
    """What is wrong with a key, and which was probably meant, else the ``summary`` of all."""
    near = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {summary}"
    return f"unknown key {shown(key)}; {hint}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"expected every key once, got {shown(twice)} twice")
    return value


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"expected numbers as JSON has them, got {constant}")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"expected numbers that a float can hold, got {shown(digits)}")
    return value


def _check_characters(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"expected valid Unicode, got the lone surrogate {half!r}") from None

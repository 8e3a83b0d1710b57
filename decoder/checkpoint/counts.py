"""Numbers of a configuration that are how many objects are made of it, whatever their size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from decoder.errors import UserError

MOST_OBJECTS = 2048  # layers, experts or labels of a model of which nothing else is known
_COUNT = re.compile(r"layers?$|^(num|n)_.*(experts|labels|codebooks|stages|blocks)$")
_LARGEST = 2**53  # the largest integer that every reader of JSON agrees on


def is_positive(value: Any) -> bool:
    """Whether it is a positive integer; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def require_countable(fields: Mapping[str, Any], file: Path | str, most: int) -> None:
    """Refuse a configuration that would make its reader count to a billion.

    Args:
        fields: of a JSON file, at any depth.
        file: for messages.
        most: objects of one kind.

    Raises:
        UserError: which number, and the largest allowed.
    """
    for key, value in _items(fields):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if abs(value) > _LARGEST:
            raise UserError(f"{file}: {key} must be below 2**53, got about 2**{value.bit_length()}")
        if value > most and _COUNT.search(str(key)):
            raise UserError(f"{file}: {key} must be at most {most}, got {value}")


def _items(fields: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values at every depth; iterative, as a file may be nested deeper than the stack."""
    waiting = [fields]
    while waiting:
        found = waiting.pop()
        if isinstance(found, list):
            waiting += found
        elif isinstance(found, Mapping):
            yield from found.items()
            waiting += found.values()

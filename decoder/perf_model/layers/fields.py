"""Fields of a config, checked: counts of things, and what kind each layer is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decoder.checkpoint.counts import is_positive

Fields = Mapping[str, Any]


def need(fields: Fields, *names: str) -> int:
    """The first of these fields that is given, a positive integer.

    Raises:
        ValueError: none is, or it is something else.
    """
    for name in names:
        if fields.get(name) is not None:
            value: int = fields[name]
            if not is_positive(value):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
            return value
    raise ValueError(f"config must have {' or '.join(names)}, got fields {sorted(fields)[:40]}")


def optional(fields: Fields, name: str) -> int:
    """A field that may be missing, ``None`` or 0, all of which are 0."""
    return need(fields, name) if fields.get(name) else 0


def per_layer(fields: Fields, name: str, layers: int) -> list[str] | None:
    """A list of names, one for each layer; ``None`` where there is none.

    Raises:
        ValueError: no list of names, or of another length.
    """
    types = fields.get(name)
    if types is None:
        return None
    if not isinstance(types, list | tuple) or not all(isinstance(x, str) for x in types):
        raise ValueError(f"{name} must be a list of names, got {str(types)[:80]!r}")
    if len(types) != layers:
        raise ValueError(f"{name} must name the {layers} layers, got {len(types)}")
    return list(types)

"""Spellings that several sub-commands share."""

from __future__ import annotations


def numbers(text: str) -> list[int]:
    """``"1,2,8"`` -> ``[1, 2, 8]``."""
    return [int(part) for part in text.split(",")]

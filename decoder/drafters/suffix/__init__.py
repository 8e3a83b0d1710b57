"""Suffix lookup: propose what followed these tokens before, in this or in another sequence."""

from __future__ import annotations

from .drafter import SuffixDrafter

__all__ = ["SuffixDrafter"]

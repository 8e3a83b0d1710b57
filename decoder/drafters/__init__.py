"""Drafters: who proposes the tokens that the target verifies."""

from __future__ import annotations

from .base import Drafter
from .ngram import HybridDrafter, NgramDrafter
from .none import NoDrafter
from .replay import ReplayDrafter
from .self_draft import SelfDrafter
from .suffix import SuffixDrafter
from .table import DRAFTERS, DrafterKind, DraftOptions, build_drafter

__all__ = [
    "DRAFTERS",
    "DraftOptions",
    "Drafter",
    "DrafterKind",
    "HybridDrafter",
    "NgramDrafter",
    "NoDrafter",
    "ReplayDrafter",
    "SelfDrafter",
    "SuffixDrafter",
    "build_drafter",
]

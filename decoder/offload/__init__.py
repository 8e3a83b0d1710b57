"""Experts that do not fit in memory: read from their files when a step needs them.

A model loaded with an ``Offload`` holds everything but its routed experts. ``store.py`` reads those
that a layer's tokens were sent to, each once, and keeps as many as its budget has room for.
"""

from __future__ import annotations

from .loading import ExpertsApart, store_of
from .settings import Offload
from .stats import OffloadStats

__all__ = ["ExpertsApart", "Offload", "OffloadStats", "store_of"]

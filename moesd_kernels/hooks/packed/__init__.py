"""Modules that hold weights in a quantised format, whoever made them, read in one way."""

from __future__ import annotations

from .linear import StoredWeight, linear_classes, stored_weight

__all__ = ["StoredWeight", "linear_classes", "stored_weight"]

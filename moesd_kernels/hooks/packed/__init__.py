"""Modules that hold weights in a quantised format, whoever made them, read in one way."""

from __future__ import annotations

from .experts import (
    DOWN_FORMAT,
    FORMAT,
    INT8_ACTIVATIONS,
    SCALE,
    StoredExperts,
    scale_of,
    stored_experts,
)
from .linear import StoredWeight, linear_classes, stored_weight

__all__ = [
    "DOWN_FORMAT",
    "FORMAT",
    "INT8_ACTIVATIONS",
    "SCALE",
    "StoredExperts",
    "StoredWeight",
    "linear_classes",
    "scale_of",
    "stored_experts",
    "stored_weight",
]

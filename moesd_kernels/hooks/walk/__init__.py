"""Walks over a model's decoder layers, in C++ on a CPU and in few Triton launches on a GPU."""

from __future__ import annotations

from ..packed import stored_weight
from .attention import add_attention, joining_obstacle, norm_of, projections, tell_format
from .by_device import (
    add_rms_norm,
    head_of,
    is_plain,
    layer_stack,
    rms_norm,
    run_layers,
    runs_linear,
    runs_norm,
    set_mlp,
    states_apart,
)

__all__ = [
    "add_attention",
    "add_rms_norm",
    "head_of",
    "is_plain",
    "joining_obstacle",
    "layer_stack",
    "norm_of",
    "projections",
    "rms_norm",
    "run_layers",
    "runs_linear",
    "runs_norm",
    "set_mlp",
    "states_apart",
    "stored_weight",
    "tell_format",
]

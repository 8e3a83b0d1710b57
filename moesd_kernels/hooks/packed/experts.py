"""Experts modules whose two projections are stored in a weight format."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from .fp8 import is_block_scaled, read_scale

# Of a module of our own: its weight formats, what the name of a scale adds to its weight's, and
# whether activations are rounded.
FORMAT, DOWN_FORMAT, SCALE = "weight_format", "down_format", "_scale"
INT8_ACTIVATIONS = "int8_activations"


class StoredExperts(NamedTuple):
    """How an experts module keeps its projections.

    Attributes:
        weight_format: a key of ``moesd_kernels.formats.WEIGHT_FORMATS``.
        down_format: of the down projection, where it has another.
        scale: what a scale's name adds to its weight's.
        refusal: why we cannot read them, or None.
        int8_activations: whether activations are rounded to eight bits before the products.
    """

    weight_format: str = "plain"
    down_format: str | None = None
    scale: str = SCALE
    refusal: str | None = None
    int8_activations: bool = False

    @property
    def plain(self) -> bool:
        """Whether both are numbers in the dtype of the hidden states."""
        return self.weight_format == "plain" and self.down_format is None


def stored_experts(experts: nn.Module) -> StoredExperts:
    """How the projections of an experts module lie; plain, unless it says otherwise."""
    own = experts.__dict__.get(FORMAT)
    if own is not None:
        state = experts.__dict__
        rounds = state.get(INT8_ACTIVATIONS, False)
        return StoredExperts(own, state.get(DOWN_FORMAT), int8_activations=rounds)
    fp8 = sys.modules.get("transformers.integrations.finegrained_fp8")
    if fp8 is None or not isinstance(experts, fp8.FP8Experts):
        return StoredExperts()
    names = ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", "down_proj")
    projections = [
        (getattr(experts, name), getattr(experts, f"{name}_scale_inv")) for name in names
    ]
    if not all(is_block_scaled(weight, scale) for weight, scale in projections):
        return StoredExperts(refusal="its FP8 weights have no scale for each 128 x 128 of them")
    return StoredExperts("fp8_block", scale="_scale_inv")


def scale_of(experts: Any, projection: str, stored: StoredExperts) -> Tensor | None:
    """The scale of a projection, as its format wants it."""
    scale: Tensor | None = getattr(experts, f"{projection}{stored.scale}", None)
    return read_scale(scale) if stored.weight_format == "fp8_block" and scale is not None else scale

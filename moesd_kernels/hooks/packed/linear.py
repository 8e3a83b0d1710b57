"""Linear layers whose matrix is stored in a weight format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from moesd_kernels.formats import QuantizedLinear


class StoredWeight(NamedTuple):
    """A linear layer's matrix where it lies.

    Attributes:
        weight: as the format stores ``[out, in]``.
        scale: its scales, or None.
        weight_format: a key of ``moesd_kernels.formats.WEIGHT_FORMATS``.
    """

    weight: nn.Parameter
    scale: nn.Parameter | None = None
    weight_format: str = "plain"


def _own(module: Any) -> StoredWeight:
    return StoredWeight(module.weight, module.weight_scale, module.weight_format)


def _plain(module: Any) -> StoredWeight:
    return StoredWeight(module.weight)


_READERS: dict[type[nn.Module], Callable[[Any], StoredWeight]] = {
    nn.Linear: _plain,
    QuantizedLinear: _own,
}


def linear_classes() -> frozenset[type[nn.Module]]:
    """Classes whose modules compute ``x @ W.T + bias`` of a matrix that can be read."""
    return frozenset(_READERS)


def stored_weight(module: nn.Module) -> StoredWeight:
    """The matrix of a module of ``linear_classes``."""
    return _READERS[type(module)](module)

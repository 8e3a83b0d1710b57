"""Linear layers whose matrix is stored in a weight format."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from moesd_kernels.formats import QuantizedLinear

from .fp8 import is_block_scaled, read_scale, spread_scale


class StoredWeight(NamedTuple):
    """A linear layer's matrix where it lies.

    Attributes:
        weight: as the format stores ``[out, in]``.
        scale: its scales, or None.
        weight_format: a key of ``moesd_kernels.formats.WEIGHT_FORMATS``, or None: not one of them.
        int8_activations: whether hidden states are rounded to eight bits before the product.
    """

    weight: nn.Parameter
    scale: Tensor | None = None
    weight_format: str | None = "plain"
    int8_activations: bool = False


def _own(module: Any) -> StoredWeight:
    stored = module.weight, module.weight_scale, module.weight_format
    return StoredWeight(*stored, module.int8_activations)


def _plain(module: Any) -> StoredWeight:
    return StoredWeight(module.weight)


def _fp8(module: Any) -> StoredWeight:
    weight, scale = module.weight, module.weight_scale_inv
    if module.block_size is None and scale.numel() == 1:
        return StoredWeight(weight, spread_scale(weight, scale), "fp8_block")
    if scale.ndim != 2 or not is_block_scaled(weight, scale):
        return StoredWeight(weight, scale, None)
    return StoredWeight(weight, read_scale(scale), "fp8_block")


_Reader = Callable[[Any], StoredWeight]
_READERS: dict[type[nn.Module], _Reader] = {nn.Linear: _plain, QuantizedLinear: _own}
# Of transformers, by module and name: known once somebody has loaded such a model.
_THEIRS: dict[tuple[str, str], _Reader] = {
    ("transformers.integrations.finegrained_fp8", "FP8Linear"): _fp8,
}


def linear_classes() -> frozenset[type[nn.Module]]:
    """Classes whose modules compute ``x @ W.T + bias`` of a matrix that can be read."""
    for (module, name), reader in _THEIRS.items():
        found = getattr(sys.modules.get(module), name, None)
        if found is not None:
            _READERS[found] = reader
    return frozenset(_READERS)


def stored_weight(module: nn.Module) -> StoredWeight:
    """The matrix of a module of ``linear_classes``."""
    return _READERS[type(module)](module)

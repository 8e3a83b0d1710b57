"""Checks that stored weights are what their format says; errors say what was expected."""

from __future__ import annotations

from torch import Tensor

from .description import GROUPS, WeightFormat


def check_weight(
    name: str, weight: Tensor, scale: Tensor | None, stored: WeightFormat, shape: tuple[int, ...]
) -> None:
    """Raise unless tensors hold weights of a shape in a format.

    Args:
        name: what messages call the weight; its scale is ``{name}``'s scale.
        weight: as stored.
        scale: its scales, or None.
        stored: the format.
        shape: ``(..., R, C)`` of the weights, whatever a row takes in memory.

    Raises:
        TypeError: a dtype, or a scale that is missing or too much.
        ValueError: a shape, or a depth that the format cannot hold.
    """
    if weight.dtype != stored.dtype and stored.dtype is not None:
        raise TypeError(
            f"{name} in format {stored.name} must be {stored.dtype}, got {weight.dtype}"
        )
    *leading, depth = shape
    if depth % stored.block:
        raise ValueError(
            f"{name} in format {stored.name} needs a depth that is a multiple of {stored.block}, "
            f"got {depth}"
        )
    if tuple(weight.shape) != (*leading, stored.width(depth)):
        raise ValueError(
            f"{name} in format {stored.name} must be {(*leading, stored.width(depth))} for "
            f"weights {shape}, got {tuple(weight.shape)}"
        )
    _check_scale(name, scale, stored, shape)
    if scale is not None and scale.device != weight.device:
        raise ValueError(
            f"the scale of {name} must be on {weight.device} like it, got {scale.device}"
        )


def _check_scale(
    name: str, scale: Tensor | None, stored: WeightFormat, shape: tuple[int, ...]
) -> None:
    if stored.scale_dtype is None:
        if scale is not None:
            raise TypeError(f"{name} in format {stored.name} takes no scale, got {scale.dtype}")
        return
    if scale is None:
        raise TypeError(f"{name} in format {stored.name} needs a scale, got None")
    if scale.dtype != stored.scale_dtype:
        raise TypeError(
            f"the scale of {name} in format {stored.name} must be {stored.scale_dtype}, "
            f"got {scale.dtype}"
        )
    *leading, rows, depth = shape
    allowed = [(*leading, *sizes) for sizes in stored.scale_shapes(rows, depth)]
    if tuple(scale.shape) not in allowed:
        expected = " or ".join(map(str, allowed)) or f"for a depth that {GROUPS[0]} divides"
        raise ValueError(
            f"the scale of {name} in format {stored.name} must be {expected}, "
            f"got {tuple(scale.shape)}"
        )

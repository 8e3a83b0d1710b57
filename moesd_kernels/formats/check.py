"""Checks that stored weights are what their format says; errors say what was expected."""

from __future__ import annotations

from torch import Tensor

from .description import GROUPS, WeightFormat


def check_weight(
    name: str, weight: Tensor, scale: Tensor | None, stored: WeightFormat, rows: int, depth: int
) -> None:
    """Raise unless tensors hold ``[..., R, C]`` weights in a format.

    Args:
        name: what messages call the weight; its scale is ``{name}``'s scale.
        weight: as stored, of any leading sizes.
        scale: its scales, of the same leading sizes, or None.
        stored: the format.
        rows: R.
        depth: C.

    Raises:
        TypeError: a dtype, or a scale that is missing or too much.
        ValueError: a shape, or a depth that the format cannot hold.
    """
    if weight.dtype != stored.dtype and stored.dtype is not None:
        raise TypeError(
            f"{name} in format {stored.name} must be {stored.dtype}, got {weight.dtype}"
        )
    multiple = stored.block
    if depth % multiple:
        raise ValueError(
            f"{name} in format {stored.name} needs a depth that is a multiple of {multiple}, "
            f"got {depth}"
        )
    leading = tuple(weight.shape[:-2])
    if tuple(weight.shape) != (*leading, rows, stored.width(depth)):
        raise ValueError(
            f"{name} in format {stored.name} must be {(*leading, rows, stored.width(depth))}, "
            f"got {tuple(weight.shape)}"
        )
    _check_scale(name, scale, stored, leading, rows, depth)
    if scale is not None and scale.device != weight.device:
        raise ValueError(
            f"the scale of {name} must be on {weight.device} like it, got {scale.device}"
        )


def _check_scale(
    name: str,
    scale: Tensor | None,
    stored: WeightFormat,
    leading: tuple[int, ...],
    rows: int,
    depth: int,
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
    allowed = [(*leading, *shape) for shape in stored.scale_shapes(rows, depth)]
    if tuple(scale.shape) not in allowed:
        expected = " or ".join(map(str, allowed)) or f"for a depth that {GROUPS[0]} divides"
        raise ValueError(
            f"the scale of {name} in format {stored.name} must be {expected}, "
            f"got {tuple(scale.shape)}"
        )

"""int8 and int4 with a bf16 scale for every G weights of a row: our own, symmetric around zero."""

from __future__ import annotations

import torch
from torch import Tensor

from .description import GROUPS, WeightFormat
from .nibbles import pack_nibbles, unpack_nibbles

_MIDDLE = 8  # the int4 code of zero
_CHUNK = 1 << 22  # weights that are quantised together: what they take beside the result is small
# Where the weight of largest magnitude in a group of int4 may lie, in steps from zero. There is one
# code more below zero than above; past it, what is cut off at the edge makes every step smaller.
# Against 7 alone, the least of these four takes a seventh off the error of normal weights.
_EDGES = (-7.25, -8.0, -8.75, -9.5)


def decode_int8(weight: Tensor, scale: Tensor | None) -> Tensor:
    """``q * s``.

    Args:
        weight: ``[..., R, C]`` int8.
        scale: ``[..., R, C / G]`` bf16; G may be all of C.

    Returns:
        ``[..., R, C]`` fp32.
    """
    return _scaled(weight.float(), scale)


def decode_int4(weight: Tensor, scale: Tensor | None) -> Tensor:
    """``(q - 8) * s``.

    Args:
        weight: ``[..., R, C / 2]`` uint8, two codes a byte, the low nibble first.
        scale: ``[..., R, C / G]`` bf16; G may be all of C.

    Returns:
        ``[..., R, C]`` fp32.
    """
    return _scaled(unpack_nibbles(weight).float() - _MIDDLE, scale)


def _scaled(values: Tensor, scale: Tensor | None) -> Tensor:
    assert scale is not None
    grouped = values.unflatten(-1, (scale.shape[-1], -1))
    return (grouped * scale.float()[..., None]).flatten(-2)


def quantize(weight: Tensor, name: str, group: int = GROUPS[0]) -> tuple[Tensor, Tensor]:
    """Weights in groups of G along a row, each as integers times one bf16 scale.

    Codes are rounded relative to the rounded scale. An int8 group spans its largest magnitude; of
    int4, where a step is large, a few scales are tried and the one with least squared error kept.

    Args:
        weight: ``[..., R, C]`` floating point, finite, G divides C.
        name: "int8" or "int4".
        group: G, one of ``GROUPS``, or C for one scale for a row.

    Returns:
        The weight and the scale tensor of that format, on the device of ``weight``.

    Raises:
        ValueError: an unknown format or group, or a depth that it does not divide.
    """
    if name not in ("int8", "int4"):
        raise ValueError(f"weights can be quantised to 'int8' or 'int4', got {name!r}")
    C = weight.shape[-1]
    if group not in (*GROUPS, C):
        raise ValueError(f"group must be one of {GROUPS} or the depth {C}, got {group}")
    if C % group or C % GROUPS[0]:
        least = group if group in GROUPS else GROUPS[0]
        raise ValueError(f"the depth of a weight must be a multiple of {least}, got {C}")
    shape = weight.shape[:-1]
    groups = weight.detach().reshape(-1, group)
    codes = torch.empty(groups.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(groups), dtype=torch.bfloat16, device=weight.device)
    spread = _spread_int8 if name == "int8" else _spread_int4
    parts = (tensor.split(max(1, _CHUNK // group)) for tensor in (groups, codes, scales))
    for part, code, scale in zip(*parts, strict=True):
        found = spread(part.float())
        code.copy_(found[0])
        scale.copy_(found[1])
    if name == "int4":
        codes = pack_nibbles(codes.view(torch.uint8))
    return codes.view(*shape, C // 2 if name == "int4" else C), scales.view(*shape, C // group)


def _spread_int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups [n, G]: the largest magnitude becomes 127."""
    scale = (groups.abs().amax(dim=1) / 127).to(torch.bfloat16)
    return _rounded(groups, scale, -127, 127), scale


def _spread_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups [n, G]: those of the ``_EDGES`` with least squared error."""
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))[:, 0]
    tried = []
    for edge in _EDGES:
        scale = (largest / edge).to(torch.bfloat16)
        code = _rounded(groups, scale, -_MIDDLE, _MIDDLE - 1)
        error = (code.float() * scale.float()[:, None] - groups).square().sum(dim=1)
        tried.append((error, code, scale))
    error, code, scale = tried[0]
    for other, other_code, other_scale in tried[1:]:
        better = other < error
        error = torch.where(better, other, error)
        code = torch.where(better[:, None], other_code, code)
        scale = torch.where(better, other_scale, scale)
    return code + _MIDDLE, scale


def _rounded(groups: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    """Weights [n, G] in steps of their scale, to the nearest int8; zero where the scale is."""
    step = scale.float()[:, None]
    return (groups / step.where(step != 0, 1.0)).round().clamp(least, most).to(torch.int8)


INT8 = WeightFormat(
    "int8",
    "int8, a bf16 scale for 32, 64 or 128 weights of a row or for all (ours)",
    decode_int8,
    torch.int8,
    block=GROUPS[0],
    stored=GROUPS[0],
    scales="group",
    scale_dtype=torch.bfloat16,
    integers=True,
)
INT4 = WeightFormat(
    "int4",
    "int4, a bf16 scale for 32, 64 or 128 weights of a row or for all (ours)",
    decode_int4,
    torch.uint8,
    block=GROUPS[0],
    stored=GROUPS[0] // 2,
    scales="group",
    scale_dtype=torch.bfloat16,
    integers=True,
)

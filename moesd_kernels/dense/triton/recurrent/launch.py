"""What the launchers of this folder share: rows, and the part of a step that every kernel takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import DTYPES, check_like

NUM_WARPS = 4


@triton.jit
def ragged_row(rows_ptr, keep_ptr, counts_ptr, b, num_states, Q):
    """Row, tokens to keep and tokens of sequence b; no tokens where there is no such row."""
    row = tl.load(rows_ptr + b)
    inside = (row >= 0) & (row < num_states)
    count = tl.where(inside, tl.load(counts_ptr + b), 0)
    count = tl.minimum(tl.maximum(count, 0), Q).to(tl.int32)
    return row, tl.load(keep_ptr + b), count


def check_states(states: Tensor, sizes: Sequence[int]) -> None:
    """States are what a kernel writes to.

    Raises:
        TypeError, ValueError: not float32, of other sizes than ``[R, *sizes]``, or with gaps.
    """
    check_like(states, "states", [*states.shape[:1], *sizes], torch.float32)
    if not states.is_contiguous():
        raise ValueError(f"states must be contiguous, got strides {states.stride()}")


def ragged(rows: Tensor, keep: Tensor, counts: Tensor, B: int) -> tuple[Tensor, ...]:
    """The three ``[B]`` int64 tensors, contiguous.

    Raises:
        TypeError, ValueError: dtypes or sizes differ from these.
    """
    named = {"rows": rows, "keep": keep, "counts": counts}
    for name, tensor in named.items():
        check_like(tensor, name, [B], torch.int64)
    return tuple(tensor.contiguous() for tensor in named.values())


def token_values(x: Tensor, name: str, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """x with the values of a token adjacent, wherever tokens lie: a view where strides allow one.

    Raises:
        TypeError, ValueError: dtypes or sizes differ from these.
    """
    check_like(x, name, sizes, dtype)
    dense = x[:1, :1].is_contiguous() or x.numel() == 0
    return x if dense else x.contiguous()


def floats(x: Tensor, name: str, sizes: Sequence[int]) -> Tensor:
    """Few numbers, contiguous in float32.

    Raises:
        TypeError, ValueError: no floating dtype of the kernels, or other sizes.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    check_like(x, name, sizes, x.dtype)
    return x.float().contiguous()


def check_dim(x: Tensor, name: str, shape: str, dim: int) -> None:
    """For tensors that decide the sizes of others.

    Raises:
        ValueError: another number of dimensions.
    """
    if x.dim() != dim:
        raise ValueError(f"{name} must be {shape}, got {list(x.shape)}")


def check_multiple(name: str, heads: int, part_name: str, parts: int) -> None:
    """Heads share what there is less of.

    Raises:
        ValueError: they cannot be parted equally.
    """
    if parts < 1 or heads % parts:
        raise ValueError(f"{name} must be a multiple of the {part_name} {parts}, got {heads}")

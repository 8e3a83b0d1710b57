"""Where each row's largest value is, in two launches. Not run on a GPU yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait

from .launch import check_floating, dependent_launch, rows_of

# Columns of a program: rows are parted by this alone, however many there are.
BLOCK = 4096
NUM_WARPS = 4

_NAN_ORDER = tl.constexpr(0x7FFFFFFF)
_NOTHING = tl.constexpr(-0x80000000)  # below the order of -inf
_INFINITE_ORDER = tl.constexpr(-0x7F800001)  # the order of -inf


@triton.jit
def _order(x):
    """int32 that order fp32 as numbers, all NaN above all of them; both zeros are 0."""
    bits = x.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, _NAN_ORDER, tl.where(x == 0.0, 0, order))


@triton.jit
def _argmax_part_kernel(
    x_ptr,  # [R, V]
    orders_ptr,  # [R, PARTS] int32, likewise places
    places_ptr,
    stride_xr,
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (R, PARTS); the largest of BLOCK columns and the lowest of its places."""
    pdl_wait(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_xr + column, mask=column < V, other=0.0).to(tl.float32)
    order = tl.where(column < V, _order(x), _NOTHING)
    best = tl.max(order, 0)
    tl.store(orders_ptr + row * tl.num_programs(1) + part, best)
    place = tl.min(tl.where(order == best, column, 0x7FFFFFFF), 0)
    tl.store(places_ptr + row * tl.num_programs(1) + part, place)


@triton.jit
def _argmax_join_kernel(
    orders_ptr,  # [R, PARTS] int32, likewise places
    places_ptr,
    ids_ptr,  # [R] int64
    undefined_ptr,  # [R] bool
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (R,); the largest of a row's parts."""
    pdl_wait(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS_PAD)
    inside = part < PARTS
    order = tl.load(orders_ptr + row * PARTS + part, mask=inside, other=_NOTHING)
    place = tl.load(places_ptr + row * PARTS + part, mask=inside, other=0x7FFFFFFF)
    best = tl.max(order, 0)
    place = tl.min(tl.where(order == best, place, 0x7FFFFFFF), 0)
    tl.store(ids_ptr + row, place.to(tl.int64))
    tl.store(undefined_ptr + row, (best == _NAN_ORDER) | (best == _INFINITE_ORDER))


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the largest of x ``[..., V]`` is, the lowest place among equals, NaN largest.

    Args:
        x: float32, bfloat16 or float16, any strides; V > 0.

    Returns:
        The places, int64 ``[...]``, and bool ``[...]``: rows that have no largest value, only NaN
        or -inf.

    Raises:
        TypeError, ValueError: another dtype, or nothing to choose from.
    """
    check_floating(x, "x")
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., V] with V > 0, got {list(x.shape)}")
    ids = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    undefined = torch.empty(x.shape[:-1], dtype=torch.bool, device=x.device)
    if x.numel() == 0:
        return ids, undefined
    rows = rows_of(x)
    R, V = rows.shape
    parts = triton.cdiv(V, BLOCK)
    orders = torch.empty(R, parts, dtype=torch.int32, device=x.device)
    places = torch.empty_like(orders)
    pdl = dependent_launch(x.device)
    _argmax_part_kernel[(R, parts)](
        rows, orders, places, rows.stride(0), V, BLOCK=BLOCK, **pdl, num_warps=NUM_WARPS
    )
    _argmax_join_kernel[(R,)](
        orders,
        places,
        ids,
        undefined,
        PARTS=parts,
        PARTS_PAD=max(32, triton.next_power_of_2(parts)),
        **pdl,
        num_warps=1,
    )
    return ids, undefined

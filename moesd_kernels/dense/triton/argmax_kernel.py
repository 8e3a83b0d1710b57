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

NAN_ORDER = tl.constexpr(0x7FFFFFFF)
NOTHING = tl.constexpr(-0x80000000)  # below the order of -inf
LOWEST_ORDER = tl.constexpr(-0x7F800001)  # the order of -inf


@triton.jit
def order(x):
    """int32 that order fp32 as numbers, all NaN above all of them; both zeros are 0."""
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, NAN_ORDER, tl.where(x == 0.0, 0, ordered))


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
    ordered = tl.where(column < V, order(x), NOTHING)
    best = tl.max(ordered, 0)
    tl.store(orders_ptr + row * tl.num_programs(1) + part, best)
    place = tl.min(tl.where(ordered == best, column, 0x7FFFFFFF), 0)
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
    ordered = tl.load(orders_ptr + row * PARTS + part, mask=inside, other=NOTHING)
    place = tl.load(places_ptr + row * PARTS + part, mask=inside, other=0x7FFFFFFF)
    best = tl.max(ordered, 0)
    place = tl.min(tl.where(ordered == best, place, 0x7FFFFFFF), 0)
    tl.store(ids_ptr + row, place.to(tl.int64))
    tl.store(undefined_ptr + row, (best == NAN_ORDER) | (best == LOWEST_ORDER))


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
    rows = rows_of(x)
    R, V = rows.shape
    parts = triton.cdiv(V, BLOCK)
    orders = torch.empty(R, parts, dtype=torch.int32, device=x.device)
    places = torch.empty_like(orders)
    if R:
        pdl = dependent_launch(x.device)
        _argmax_part_kernel[(R, parts)](
            rows, orders, places, rows.stride(0), V, BLOCK=BLOCK, **pdl, num_warps=NUM_WARPS
        )
    ids, undefined = join_parts(orders, places)
    return ids.view(x.shape[:-1]), undefined.view(x.shape[:-1])


def join_parts(orders: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each row's largest value, and whether it has none, from those of its parts.

    Args:
        orders: ``[R, PARTS]`` int32, the ``order`` of the largest value of each part.
        places: ``[R, PARTS]`` int32, the lowest place of each.

    Returns:
        ``[R]`` int64 and ``[R]`` bool, as ``argmax``.
    """
    R, parts = orders.shape
    ids = torch.empty(R, dtype=torch.int64, device=orders.device)
    undefined = torch.empty(R, dtype=torch.bool, device=orders.device)
    if R == 0:
        return ids, undefined
    _argmax_join_kernel[(R,)](
        orders,
        places,
        ids,
        undefined,
        PARTS=parts,
        PARTS_PAD=max(32, triton.next_power_of_2(parts)),
        **dependent_launch(orders.device),
        num_warps=1,
    )
    return ids, undefined

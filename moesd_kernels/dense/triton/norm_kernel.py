"""RMS norms of rows, or of sums of rows, in one launch. Not run on a GPU yet.

Rounds where ``csrc/cpu/kernels/row_kernels.h`` rounds; only the order in which a row's squares are
added is another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait, prefetch

from .launch import check_floating, check_like, dependent_launch, rows_of

# Columns that a program holds in registers: 32 a thread of 16 warps.
MAX_BLOCK = 16384


@triton.jit
def block_of(x_ptr, delta_ptr, column, H: tl.constexpr, HAS_DELTA: tl.constexpr):
    """Columns of a row in fp32; with a delta of their sum, rounded as a sum by itself would be."""
    x = tl.load(x_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + column, mask=column < H, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def inverse_rms(squares, eps, N: tl.constexpr):
    """1 / sqrt(squares / N + eps), every step rounded as IEEE has it; squares is fp32."""
    mean = tl.div_rn(squares, tl.full(squares.shape, N, tl.float32))
    return tl.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def store_normed(
    out_ptr, x, scale, w_ptr, column, offset, H: tl.constexpr, CAST_FIRST: tl.constexpr
):
    """Columns x of a row times scale, and times their weights."""
    normed = x * scale
    if CAST_FIRST:
        normed = normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    w = tl.load(w_ptr + column, mask=column < H, other=0.0).to(tl.float32)
    out = normed * (w + offset)
    tl.store(out_ptr + column, out.to(out_ptr.dtype.element_ty), mask=column < H)


@triton.jit
def _norm_kernel(
    x_ptr,  # [T, H]
    delta_ptr,  # [T, H] or unused
    w_ptr,  # [H]
    sum_ptr,  # [T, H] or unused
    out_ptr,  # [T, H]
    stride_xt,
    stride_dt,
    eps,
    offset,
    H: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T,); a program norms one row, held in registers unless it is wider than a block."""
    if PDL:  # the weights are cold, and no launch of a step writes them
        line = tl.arange(0, BLOCK // 32) * 32
        prefetch(w_ptr + tl.minimum(line, H - 1))
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xt
    delta_ptr += row * stride_dt
    sum_ptr += row * H
    out_ptr += row * H
    column = tl.arange(0, BLOCK)
    x = block_of(x_ptr, delta_ptr, column, H, HAS_DELTA)
    squares = x * x
    for start in range(BLOCK, H, BLOCK):
        more = block_of(x_ptr, delta_ptr, start + column, H, HAS_DELTA)
        squares += more * more
    scale = inverse_rms(tl.sum(squares, 0), eps, H)
    if HAS_DELTA:
        tl.store(sum_ptr + column, x.to(sum_ptr.dtype.element_ty), mask=column < H)
    store_normed(out_ptr, x, scale, w_ptr, column, offset, H, CAST_FIRST)
    for start in range(BLOCK, H, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = block_of(x_ptr, delta_ptr, column, H, HAS_DELTA)
        if HAS_DELTA:
            tl.store(sum_ptr + column, x.to(sum_ptr.dtype.element_ty), mask=column < H)
        store_normed(out_ptr, x, scale, w_ptr, column, offset, H, CAST_FIRST)


def rms_norm(
    x: Tensor, w: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times (w + offset), in fp32: transformers' RMSNorm classes.

    Args:
        x: ``[..., H]`` in float32, bfloat16 or float16, any strides.
        w: ``[H]`` contiguous, in x.dtype.
        eps: added to the mean.
        offset: added to the weight (Gemma: 1).
        cast_first: round to x.dtype before the product, too (Llama), not only after it (gpt-oss).

    Returns:
        x's shape, contiguous.

    Raises:
        TypeError, ValueError: dtypes or shapes differ from these.
    """
    return _launch(x, None, None, w, eps, offset, cast_first)


def add_rms_norm(x: Tensor, delta: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta``, rounded to x.dtype, and its ``rms_norm``: delta is as x, the rest as there."""
    check_like(delta, "delta", x.shape, x.dtype)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return total, _launch(x, delta, total, w, eps, 0.0, True)


def _launch(
    x: Tensor,
    delta: Tensor | None,
    total: Tensor | None,
    w: Tensor,
    eps: float,
    offset: float,
    cast_first: bool,
) -> Tensor:
    check_floating(x, "x")
    H = x.shape[-1]
    check_like(w, "w", [H], x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = rows_of(x)
    added = rows if delta is None else rows_of(delta)
    block = min(MAX_BLOCK, max(64, triton.next_power_of_2(H)))
    _norm_kernel[(rows.shape[0],)](
        rows,
        added,
        w.contiguous(),
        out if total is None else total,
        out,
        rows.stride(0),
        added.stride(0),
        float(eps),
        float(offset),
        H=H,
        HAS_DELTA=delta is not None,
        CAST_FIRST=cast_first,
        BLOCK=block,
        **dependent_launch(x.device),
        num_warps=min(16, max(1, block // 512)),
    )
    return out

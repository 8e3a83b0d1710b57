"""Weighted sum of a token's K expert outputs, in fixed order and fp32."""

import triton
import triton.language as tl

from .common import pdl_wait


@triton.jit
def experts_sum(
    partial_ptr, ids_ptr, weights_ptr, token, column, num_pairs, E, H,
    TOPK: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Columns of a token's K expert outputs, weighted and summed in order, fp32.

    A pair whose id is outside [0, E) was never computed: its partial is not read, its weight not
    multiplied.
    """
    acc = tl.zeros(column.shape, tl.float32)
    for k in tl.static_range(TOPK):
        pair = token * TOPK + k
        e = tl.load(ids_ptr + pair)
        mask = column < tl.where((e >= 0) & (e < E), H, 0)
        value = tl.zeros(column.shape, tl.float32)
        for split in tl.static_range(SPLIT_K):
            partial_ptrs = partial_ptr + (split * num_pairs.to(tl.int64) + pair) * H + column
            value += tl.load(partial_ptrs, mask=mask, other=0.0)
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        acc += tl.where(mask, value * weight, 0.0)
    return acc


@triton.jit(do_not_specialize=["num_pairs"])
def _combine_kernel(
    partial_ptr,  # [SPLIT_K, T * K, H] fp32
    ids_ptr,  # [T * K]
    weights_ptr,  # [T * K]
    out_ptr,  # [T, H]
    num_pairs,
    E,
    H,
    stride_ot,
    TOPK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T, cdiv(H, BLOCK_H)); each program writes BLOCK_H values of one token."""
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = experts_sum(
        partial_ptr, ids_ptr, weights_ptr, token, column, num_pairs, E, H, TOPK, SPLIT_K
    )
    out_ptrs = out_ptr + token * stride_ot + column
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=column < H)

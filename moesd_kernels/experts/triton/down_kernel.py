"""Down projection over the rows of each active expert."""

import triton
import triton.language as tl

from .common import (
    ROUTING_SINGLE,
    bias_tile,
    dot,
    known_rows,
    pdl_wait,
    tile_order,
)
from .formats.loader import load_weights, packed, scale_pointers, tile_pointers

_SINGLE = tl.constexpr(ROUTING_SINGLE)


@triton.jit
def _products(
    a_ptrs,  # [BLOCK_M, BLOCK_K], w_ptrs [BLOCK_N, stored elements]: of the step at k_begin
    w_ptrs,
    s_ptrs,  # as load_weights takes them
    a_mask,  # [BLOCK_M]
    w_mask,  # [BLOCK_N, 1]
    k_begin,
    k_end,
    I,
    stride_wk,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
):
    """``a @ w.T`` over the columns k_begin to k_end, ``[BLOCK_M, BLOCK_N]`` in fp32."""
    BLOCK_M: tl.constexpr = a_ptrs.shape[0]
    BLOCK_N: tl.constexpr = w_ptrs.shape[0]
    BLOCK_K: tl.constexpr = a_ptrs.shape[1]
    WIDTH: tl.constexpr = w_ptrs.shape[1]
    dtype: tl.constexpr = a_ptrs.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP_AB else [BLOCK_M, BLOCK_N], tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        k_mask = tl.full([1, BLOCK_K], True, tl.int1) if EVEN_K else (k + offs_k < I)[None, :]
        a = tl.load(a_ptrs, mask=a_mask[:, None] & k_mask, other=0.0)
        w = load_weights(w_ptrs, s_ptrs, w_mask, k, I, dtype, FORMAT, GROUP, EVEN_K)
        acc = dot(a, w, acc, SWAP_AB)
        a_ptrs += BLOCK_K
        w_ptrs += WIDTH * stride_wk
    if SWAP_AB:
        acc = tl.trans(acc)
    return acc


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "group_m"])
def _down_kernel(
    act_ptr,  # [T * K, I], rows in sorted order
    w_ptr,  # [E, H, I], any strides, or as FORMAT stores it
    scale_ptr,  # as FORMAT has it, or None
    bias_ptr,  # [E, H] or unused
    partial_ptr,  # [SPLIT_K, T * K, H] fp32, rows in pair order
    ids_ptr,  # [T * K]
    sorted_to_pair_ptr,  # [T * K]
    blocks_ptr,  # [num_blocks, 3]
    num_pairs, num_blocks, group_m, E, H, I, stride_we, stride_wn, stride_wk, stride_be,
    ROUTING: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, SWAP_AB: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (num_blocks * cdiv(H, BLOCK_N), SPLIT_K); each program one range of I of a tile."""
    pdl_wait(PDL)
    block, tile = tile_order(tl.program_id(0), num_blocks, tl.cdiv(H, BLOCK_N), group_m)
    row = tl.arange(0, BLOCK_M)
    e, first, rows = known_rows(block, ids_ptr, blocks_ptr, E, ROUTING == _SINGLE)
    if e < 0:
        return
    row_mask = row < rows
    pair = first + row
    if ROUTING != _SINGLE:
        pair = tl.load(sorted_to_pair_ptr + first + row, mask=row_mask, other=0)

    # Whole BLOCK_K steps per split, so that the order of summation does not depend on T.
    steps = tl.cdiv(tl.cdiv(I, BLOCK_K), SPLIT_K)
    split = tl.program_id(1)
    k_begin = split * steps * BLOCK_K
    k_end = tl.minimum(k_begin + steps * BLOCK_K, I)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = act_ptr + (first + row).to(tl.int64)[:, None] * I + k_begin + offs_k[None, :]
    offs_n = tl.arange(0, BLOCK_N)
    column = tile * BLOCK_N + offs_n
    w_mask = (column < H)[:, None]
    w_base = w_ptr + e.to(tl.int64) * stride_we
    w_base += (k_begin // packed(FORMAT)).to(tl.int64) * stride_wk
    w_ptrs = tile_pointers(w_base, tile * BLOCK_N, offs_n, stride_wn, stride_wk, FORMAT, BLOCK_K)
    s_ptrs = scale_pointers(scale_ptr, e, H, I, column, FORMAT, GROUP, BLOCK_K)
    acc = _products(
        a_ptrs, w_ptrs, s_ptrs, row_mask, w_mask, k_begin, k_end, I, stride_wk,
        FORMAT, GROUP, EVEN_K, SWAP_AB,
    )  # fmt: skip
    if HAS_BIAS:  # once, not once per split
        acc += bias_tile(bias_ptr, e, stride_be, column, column < tl.where(split == 0, H, 0))
    out_row = split.to(tl.int64) * num_pairs + pair
    out_ptrs = partial_ptr + out_row[:, None] * H + column[None, :]
    tl.store(out_ptrs, acc, mask=row_mask[:, None] & (column < H)[None, :])

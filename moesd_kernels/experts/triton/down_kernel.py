"""Down projection over the rows of each active expert."""

import triton
import triton.language as tl

from .common import ROUTING_SINGLE, dot, pdl_wait, tile_order

_SINGLE = tl.constexpr(ROUTING_SINGLE)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "group_m"])
def _down_kernel(
    act_ptr,  # [T * K, I], rows in sorted order
    w_ptr,  # [E, H, I], any strides
    bias_ptr,  # [E, H] or unused
    partial_ptr,  # [SPLIT_K, T * K, H] fp32, rows in pair order
    ids_ptr,  # [T * K]
    sorted_to_pair_ptr,  # [T * K]
    blocks_ptr,  # [num_blocks, 3]
    num_pairs,
    num_blocks,
    group_m,
    E,
    H,
    I,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    ROUTING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (num_blocks * cdiv(H, BLOCK_N), SPLIT_K); each program one range of I of a tile."""
    pdl_wait(PDL)
    block, tile = tile_order(tl.program_id(0), num_blocks, tl.cdiv(H, BLOCK_N), group_m)
    row = tl.arange(0, BLOCK_M)
    if ROUTING == _SINGLE:
        e = tl.load(ids_ptr + block).to(tl.int32)
        e = tl.where(e < E, e, -1)
        first = block
        rows = 1
    else:
        e = tl.load(blocks_ptr + block * 3)
        first = tl.load(blocks_ptr + block * 3 + 1)
        rows = tl.load(blocks_ptr + block * 3 + 2)
    if e < 0:
        return
    row_mask = row < rows
    if ROUTING == _SINGLE:
        pair = first + row
    else:
        pair = tl.load(sorted_to_pair_ptr + first + row, mask=row_mask, other=0)

    # Whole BLOCK_K steps per split, so that the order of summation does not depend on T.
    steps = tl.cdiv(tl.cdiv(I, BLOCK_K), SPLIT_K)
    split = tl.program_id(1)
    k_begin = split * steps * BLOCK_K
    k_end = tl.minimum(k_begin + steps * BLOCK_K, I)
    here_k = tl.arange(0, BLOCK_K)
    a_ptrs = act_ptr + (first + row).to(tl.int64)[:, None] * I + k_begin + here_k[None, :]
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    w_mask = (column < H)[:, None]
    w_base = w_ptr + e.to(tl.int64) * stride_we + (tile * BLOCK_N).to(tl.int64) * stride_wn
    w_base += k_begin.to(tl.int64) * stride_wk
    n_here = tl.arange(0, BLOCK_N)
    w_ptrs = w_base + n_here[:, None] * stride_wn + here_k[None, :] * stride_wk

    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP_AB else [BLOCK_M, BLOCK_N], tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        k_mask = tl.full([1, BLOCK_K], True, tl.int1) if EVEN_K else (k + here_k < I)[None, :]
        a = tl.load(a_ptrs, mask=row_mask[:, None] & k_mask, other=0.0)
        w = tl.load(w_ptrs, mask=w_mask & k_mask, other=0.0, eviction_policy="evict_first")
        acc = dot(a, w, acc, SWAP_AB)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    if SWAP_AB:
        acc = tl.trans(acc)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + e.to(tl.int64) * stride_be + column
        # Once, not once per split.
        bias = tl.load(bias_ptrs, mask=column < tl.where(split == 0, H, 0), other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out_row = split.to(tl.int64) * num_pairs + pair
    out_ptrs = partial_ptr + out_row[:, None] * H + column[None, :]
    tl.store(out_ptrs, acc, mask=row_mask[:, None] & (column < H)[None, :])

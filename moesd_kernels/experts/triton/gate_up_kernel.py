"""gate and up projections with the activation, over the rows of each active expert.

Weights are loaded ``evict_first``, so that they do not push tokens out of the cache; Triton 3.6
drops the hint on pipelined copies, 3.9 keeps it on Hopper and newer.
"""

import triton
import triton.language as tl

from .common import (
    ROUTING_INLINE,
    ROUTING_SINGLE,
    bias_tile,
    dot,
    glu,
    known_rows,
    pdl_wait,
    tile_order,
    tile_pointers,
)
from .plan_kernel import route_block

_INLINE = tl.constexpr(ROUTING_INLINE)
_SINGLE = tl.constexpr(ROUTING_SINGLE)


@triton.jit
def _products(
    x_ptrs,  # [BLOCK_M, BLOCK_K]
    w_ptrs,  # [N, BLOCK_K], likewise up_ptrs
    up_ptrs,
    x_mask,
    w_mask,
    H,
    stride_wk,
    HAS_UP: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
):
    """``x @ w.T`` and, if there is an up tile, ``x @ up.T``; each ``[BLOCK_M, N]`` in fp32."""
    BLOCK_M: tl.constexpr = x_ptrs.shape[0]
    BLOCK_K: tl.constexpr = x_ptrs.shape[1]
    N: tl.constexpr = w_ptrs.shape[0]
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([N, BLOCK_M] if SWAP_AB else [BLOCK_M, N], tl.float32)
    acc_up = acc
    for k in range(0, H, BLOCK_K):
        k_mask = tl.full([1, BLOCK_K], True, tl.int1) if EVEN_K else (k + offs_k < H)[None, :]
        x = tl.load(x_ptrs, mask=x_mask & k_mask, other=0.0, eviction_policy="evict_last")
        w = tl.load(w_ptrs, mask=w_mask & k_mask, other=0.0, eviction_policy="evict_first")
        acc = dot(x, w, acc, SWAP_AB)
        if HAS_UP:
            w = tl.load(up_ptrs, mask=w_mask & k_mask, other=0.0, eviction_policy="evict_first")
            acc_up = dot(x, w, acc_up, SWAP_AB)
            up_ptrs += BLOCK_K * stride_wk
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    if SWAP_AB:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    return acc, acc_up


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "group_m"])
def _gate_up_kernel(
    x_ptr,  # [T, H]
    w_ptr,  # [E, 2I, H] (or [E, I, H] when not GATED), any strides
    bias_ptr,  # [E, 2I] or unused
    act_ptr,  # [T * K, I], rows in sorted order
    ids_ptr,  # [T * K]
    sorted_to_pair_ptr,  # [T * K]
    blocks_ptr,  # [num_blocks, 3]
    num_pairs, num_blocks, group_m, E, H, I,
    stride_xt, stride_we, stride_wn, stride_wk, stride_be, limit, alpha,
    TOPK: tl.constexpr, N_PAD: tl.constexpr, E_PAD: tl.constexpr, CHUNKS: tl.constexpr,
    ROUTING: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr,
    HAS_ALPHA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SWAP_AB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (num_blocks * cdiv(I, BLOCK_N),); a program makes one ``[BLOCK_M, BLOCK_N]`` tile."""
    pdl_wait(PDL)
    block, tile = tile_order(tl.program_id(0), num_blocks, tl.cdiv(I, BLOCK_N), group_m)
    if ROUTING == _INLINE:
        e, first, rows = route_block(
            block, ids_ptr, sorted_to_pair_ptr, blocks_ptr, num_pairs, E,
            N_PAD, E_PAD, CHUNKS, BLOCK_M,
        )  # fmt: skip
    else:
        e, first, rows = known_rows(block, ids_ptr, blocks_ptr, E, ROUTING == _SINGLE)
    if e < 0:
        return
    row, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    token = tl.zeros([BLOCK_M], tl.int32)
    if ROUTING != _SINGLE:
        token = tl.load(sorted_to_pair_ptr + first + row, mask=row < rows, other=0) // TOPK
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * stride_xt + offs_k[None, :]
    x_mask = (row < rows)[:, None]
    # Interleaved rows (g0, u0, g1, u1, …) are read as one tile and parted after the product.
    SPLIT: tl.constexpr = GATED and INTERLEAVED
    HAS_UP: tl.constexpr = GATED and not INTERLEAVED
    WIDE: tl.constexpr = 2 * BLOCK_N if SPLIT else BLOCK_N
    first_n, offs_n = tile * WIDE, tl.arange(0, WIDE)
    n_mask = offs_n < (2 * I if SPLIT else I) - first_n
    w_ptr += e.to(tl.int64) * stride_we
    w_ptrs = tile_pointers(w_ptr, first_n, offs_n, offs_k, stride_wn, stride_wk)
    up_ptrs = w_ptrs
    if HAS_UP:
        up_ptrs = tile_pointers(w_ptr, first_n + I, offs_n, offs_k, stride_wn, stride_wk)
    out, up = _products(
        x_ptrs, w_ptrs, up_ptrs, x_mask, n_mask[:, None], H, stride_wk, HAS_UP, EVEN_K, SWAP_AB
    )
    if HAS_BIAS:
        out += bias_tile(bias_ptr, e, stride_be, first_n + offs_n, n_mask)
        if HAS_UP:
            up += bias_tile(bias_ptr, e, stride_be, I + first_n + offs_n, n_mask)
    if SPLIT:
        out, up = tl.split(tl.reshape(out, [BLOCK_M, BLOCK_N, 2]))
    out = glu(out, up, limit, alpha, ACTIVATION, GATED, HAS_LIMIT, HAS_ALPHA)

    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    act_ptrs = act_ptr + (first + row).to(tl.int64)[:, None] * I + column[None, :]
    tl.store(act_ptrs, out.to(act_ptr.dtype.element_ty), mask=x_mask & (column < I)[None, :])

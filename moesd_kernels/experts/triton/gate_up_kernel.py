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
)
from .formats.loader import load_weights, scale_pointers, tile_pointers
from .plan_kernel import route_block

_INLINE = tl.constexpr(ROUTING_INLINE)
_SINGLE = tl.constexpr(ROUTING_SINGLE)


@triton.jit
def _products(
    x_ptrs,  # [BLOCK_M, BLOCK_K]
    w_ptrs,  # [N, stored elements of BLOCK_K columns], likewise up_ptrs
    up_ptrs,
    s_ptrs,  # as load_weights takes them, likewise up_s_ptrs
    up_s_ptrs,
    x_mask,
    w_mask,
    H,
    stride_wk,
    HAS_UP: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
):
    """``x @ w.T`` and, if there is an up tile, ``x @ up.T``; each ``[BLOCK_M, N]`` in fp32."""
    BLOCK_M: tl.constexpr = x_ptrs.shape[0]
    BLOCK_K: tl.constexpr = x_ptrs.shape[1]
    N: tl.constexpr = w_ptrs.shape[0]
    WIDTH: tl.constexpr = w_ptrs.shape[1]
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([N, BLOCK_M] if SWAP_AB else [BLOCK_M, N], tl.float32)
    acc_up = acc
    for k in range(0, H, BLOCK_K):
        k_mask = tl.full([1, BLOCK_K], True, tl.int1) if EVEN_K else (k + offs_k < H)[None, :]
        x = tl.load(x_ptrs, mask=x_mask & k_mask, other=0.0, eviction_policy="evict_last")
        w = load_weights(w_ptrs, s_ptrs, w_mask, k, H, dtype, FORMAT, GROUP, EVEN_K)
        acc = dot(x, w, acc, SWAP_AB)
        if HAS_UP:
            w = load_weights(up_ptrs, up_s_ptrs, w_mask, k, H, dtype, FORMAT, GROUP, EVEN_K)
            acc_up = dot(x, w, acc_up, SWAP_AB)
            up_ptrs += WIDTH * stride_wk
        x_ptrs += BLOCK_K
        w_ptrs += WIDTH * stride_wk
    if SWAP_AB:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    return acc, acc_up


@triton.jit
def _tokens(sorted_to_pair_ptr, first, row, rows, TOPK: tl.constexpr, ROUTING: tl.constexpr):
    """Tokens of a block's rows; those beyond the last have token 0."""
    token = tl.zeros(row.shape, tl.int32)
    if ROUTING != _SINGLE:
        token = tl.load(sorted_to_pair_ptr + first + row, mask=row < rows, other=0) // TOPK
    return token


@triton.jit
def _add_bias(out, up, bias_ptr, e, stride_be, row, I, mask, HAS_UP: tl.constexpr):
    """Both products with the bias of their weight rows."""
    out += bias_tile(bias_ptr, e, stride_be, row, mask)
    if HAS_UP:
        up += bias_tile(bias_ptr, e, stride_be, I + row, mask)
    return out, up


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "group_m"])
def _gate_up_kernel(
    x_ptr,  # [T, H]
    w_ptr,  # [E, 2I, H] (or [E, I, H] when not GATED), any strides, or as FORMAT stores it
    scale_ptr,  # as FORMAT has it, or None
    bias_ptr,  # [E, 2I] or unused
    act_ptr,  # [T * K, I], rows in sorted order
    ids_ptr, sorted_to_pair_ptr,  # [T * K]
    blocks_ptr,  # [num_blocks, 3]
    num_pairs, num_blocks, group_m, E, H, I, stride_xt, stride_we, stride_wn, stride_wk, stride_be,
    limit, alpha,
    TOPK: tl.constexpr, N_PAD: tl.constexpr, E_PAD: tl.constexpr, CHUNKS: tl.constexpr,
    ROUTING: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr,
    HAS_ALPHA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SWAP_AB: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
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
    token = _tokens(sorted_to_pair_ptr, first, row, rows, TOPK, ROUTING)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * stride_xt + offs_k[None, :]
    x_mask = (row < rows)[:, None]
    # Interleaved rows (g0, u0, g1, u1, …) are read as one tile and parted after the product.
    SPLIT: tl.constexpr = GATED and INTERLEAVED
    HAS_UP: tl.constexpr = GATED and not INTERLEAVED
    WIDE: tl.constexpr = 2 * BLOCK_N if SPLIT else BLOCK_N
    first_n, offs_n = tile * WIDE, tl.arange(0, WIDE)
    n_mask = offs_n < (2 * I if SPLIT else I) - first_n
    w_ptr += e.to(tl.int64) * stride_we
    w_ptrs = tile_pointers(w_ptr, first_n, offs_n, stride_wn, stride_wk, FORMAT, BLOCK_K)
    up_ptrs = w_ptrs
    if HAS_UP:
        up_ptrs = tile_pointers(w_ptr, first_n + I, offs_n, stride_wn, stride_wk, FORMAT, BLOCK_K)
    R, w_row = 2 * I if GATED else I, first_n + offs_n
    s_ptrs = scale_pointers(scale_ptr, e, R, H, w_row, FORMAT, GROUP, BLOCK_K)
    up_s_ptrs = scale_pointers(scale_ptr, e, R, H, I + w_row, FORMAT, GROUP, BLOCK_K)
    out, up = _products(
        x_ptrs, w_ptrs, up_ptrs, s_ptrs, up_s_ptrs, x_mask, n_mask[:, None], H, stride_wk,
        HAS_UP, FORMAT, GROUP, EVEN_K, SWAP_AB,
    )  # fmt: skip
    if HAS_BIAS:
        out, up = _add_bias(out, up, bias_ptr, e, stride_be, w_row, I, n_mask, HAS_UP)
    if SPLIT:
        out, up = tl.split(tl.reshape(out, [BLOCK_M, BLOCK_N, 2]))
    out = glu(out, up, limit, alpha, ACTIVATION, GATED, HAS_LIMIT, HAS_ALPHA)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    act_ptrs = act_ptr + (first + row).to(tl.int64)[:, None] * I + column[None, :]
    tl.store(act_ptrs, out.to(act_ptr.dtype.element_ty), mask=x_mask & (column < I)[None, :])

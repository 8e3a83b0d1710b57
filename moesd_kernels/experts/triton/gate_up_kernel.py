"""gate and up projections with the activation, over the rows of each active expert.

Weights are loaded ``evict_first``, so that they do not push tokens out of the cache; Triton 3.6
drops the hint on pipelined copies, 3.9 keeps it on Hopper and newer.
"""

import triton
import triton.language as tl

from .common import ROUTING_INLINE, ROUTING_SINGLE, activate, dot, glu, pdl_wait, tile_order
from .plan_kernel import route_block

_INLINE = tl.constexpr(ROUTING_INLINE)
_SINGLE = tl.constexpr(ROUTING_SINGLE)


@triton.jit
def _find_rows(
    block,
    ids_ptr,
    sorted_to_pair_ptr,
    blocks_ptr,
    num_pairs,
    E,
    N_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROUTING: tl.constexpr,
):
    """(expert or -1, first sorted row, rows) of a block, however the routing is known."""
    if ROUTING == _SINGLE:
        e = tl.load(ids_ptr + block).to(tl.int32)
        return tl.where(e < E, e, -1), block, 1
    elif ROUTING == _INLINE:
        return route_block(
            block,
            ids_ptr,
            sorted_to_pair_ptr,
            blocks_ptr,
            num_pairs,
            E,
            N_PAD,
            E_PAD,
            CHUNKS,
            BLOCK_M,
        )
    else:
        entry = blocks_ptr + block * 3
        return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def _bias(bias_ptr, e, stride_be, offs_n, mask):
    """Bias of an expert's rows, as a [1, N] fp32 tile."""
    bias_ptrs = bias_ptr + e.to(tl.int64) * stride_be + offs_n
    return tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _tile_pointers(w_ptr, first_n, rows, offs_k, stride_wn, stride_wk):
    """Pointers [rows, BLOCK_K] to a weight tile; only the first row's offset can pass 2**31."""
    base = w_ptr + first_n.to(tl.int64) * stride_wn
    return base + rows[:, None] * stride_wn + offs_k[None, :] * stride_wk


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "group_m"])
def _gate_up_kernel(
    x_ptr,  # [T, H]
    w_ptr,  # [E, 2I, H] (or [E, I, H] when not GATED), any strides
    bias_ptr,  # [E, 2I] or unused
    act_ptr,  # [T * K, I], rows in sorted order
    ids_ptr,  # [T * K]
    sorted_to_pair_ptr,  # [T * K]
    blocks_ptr,  # [num_blocks, 3]
    num_pairs,
    num_blocks,
    group_m,
    E,
    H,
    I,
    stride_xt,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    limit,
    alpha,
    TOPK: tl.constexpr,
    N_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROUTING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP_AB: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (num_blocks * cdiv(I, BLOCK_N),); each program makes one [BLOCK_M, BLOCK_N] tile."""
    pdl_wait(PDL)
    block, tile = tile_order(tl.program_id(0), num_blocks, tl.cdiv(I, BLOCK_N), group_m)
    e, first, rows = _find_rows(
        block,
        ids_ptr,
        sorted_to_pair_ptr,
        blocks_ptr,
        num_pairs,
        E,
        N_PAD,
        E_PAD,
        CHUNKS,
        BLOCK_M,
        ROUTING,
    )
    if e < 0:
        return

    row = tl.arange(0, BLOCK_M)
    if ROUTING == _SINGLE:
        token = tl.zeros([BLOCK_M], tl.int32)
    else:
        token = tl.load(sorted_to_pair_ptr + first + row, mask=row < rows, other=0) // TOPK
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + token.to(tl.int64)[:, None] * stride_xt + offs_k[None, :]
    x_mask = (row < rows)[:, None]

    # Interleaved rows (g0, u0, g1, u1, …) are read as one tile and parted after the product.
    SPLIT: tl.constexpr = GATED and INTERLEAVED
    WIDE: tl.constexpr = 2 * BLOCK_N if SPLIT else BLOCK_N
    first_n = tile * WIDE
    n_here = tl.arange(0, WIDE)
    n_limit = (2 * I if SPLIT else I) - first_n
    w_mask = (n_here < n_limit)[:, None]
    w_ptr += e.to(tl.int64) * stride_we
    w_ptrs = _tile_pointers(w_ptr, first_n, n_here, offs_k, stride_wn, stride_wk)
    up_ptrs = w_ptrs
    if GATED and not INTERLEAVED:
        up_ptrs = _tile_pointers(w_ptr, first_n + I, n_here, offs_k, stride_wn, stride_wk)

    acc = tl.zeros([WIDE, BLOCK_M] if SWAP_AB else [BLOCK_M, WIDE], tl.float32)
    acc_up = acc
    for k in range(0, H, BLOCK_K):
        k_mask = tl.full([1, BLOCK_K], True, tl.int1) if EVEN_K else (k + offs_k < H)[None, :]
        x = tl.load(x_ptrs, mask=x_mask & k_mask, other=0.0, eviction_policy="evict_last")
        w = tl.load(w_ptrs, mask=w_mask & k_mask, other=0.0, eviction_policy="evict_first")
        acc = dot(x, w, acc, SWAP_AB)
        if GATED and not INTERLEAVED:
            w = tl.load(up_ptrs, mask=w_mask & k_mask, other=0.0, eviction_policy="evict_first")
            acc_up = dot(x, w, acc_up, SWAP_AB)
            up_ptrs += BLOCK_K * stride_wk
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk

    if SWAP_AB:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    if HAS_BIAS:
        acc += _bias(bias_ptr, e, stride_be, first_n + n_here, n_here < n_limit)
        if GATED and not INTERLEAVED:
            acc_up += _bias(bias_ptr, e, stride_be, I + first_n + n_here, n_here < n_limit)
    if SPLIT:
        acc, acc_up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))
    if GATED:
        out = glu(acc, acc_up, limit, alpha, ACTIVATION, HAS_LIMIT, HAS_ALPHA)
    else:
        out = activate(acc, ACTIVATION)

    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    act_ptrs = act_ptr + (first + row).to(tl.int64)[:, None] * I + column[None, :]
    tl.store(act_ptrs, out.to(act_ptr.dtype.element_ty), mask=x_mask & (column < I)[None, :])

"""The layer of a single token: matrix times vector, without matrix instructions.

A tile of a matrix product has at least 16 rows, of which one token fills one. Here every thread
multiplies what it loads, programs are narrow, so that few experts still occupy every processor, and
weight rows must be contiguous.
"""

import triton
import triton.language as tl

from .common import glu, pdl_wait, prefetch
from .formats.loader import load_weights, packed, scale_pointers

LINE_BYTES = tl.constexpr(128)


@triton.jit
def _gate_up_single_kernel(
    x_ptr,  # [1, H]
    w_ptr,  # [E, 2I, H] (or [E, I, H] when not GATED), rows contiguous, as FORMAT stores it
    scale_ptr,  # as FORMAT has it, or None
    bias_ptr,  # [E, 2I] or unused
    act_ptr,  # [K, I]
    ids_ptr,  # [K]
    E, H, I, stride_we, stride_wn, stride_be, limit, alpha,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_ALPHA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, FORMAT: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (K * cdiv(I, BLOCK_N),); each program makes BLOCK_N values of one pair."""
    pdl_wait(PDL)
    tiles = tl.cdiv(I, BLOCK_N)
    pair = tl.program_id(0) // tiles
    e = tl.load(ids_ptr + pair).to(tl.int64)
    if (e < 0) | (e >= E):
        return
    column = (tl.program_id(0) - pair * tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = column < I
    # Rows 2j and 2j + 1 of interleaved weights, else j and I + j.
    row = 2 * column if INTERLEAVED else column
    up_row = row + (1 if INTERLEAVED else I)
    PACKED: tl.constexpr = packed(FORMAT)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    w_ptrs = w_ptr + e * stride_we + row.to(tl.int64) * stride_wn
    up_ptrs = w_ptr + e * stride_we + up_row.to(tl.int64) * stride_wn
    R = 2 * I if GATED else I
    s_ptrs = scale_pointers(scale_ptr, e, R, H, row, FORMAT, GROUP, BLOCK_K)
    up_s_ptrs = scale_pointers(scale_ptr, e, R, H, up_row, FORMAT, GROUP, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_up = acc
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
        at = (start // PACKED + tl.arange(0, BLOCK_K // PACKED))[None, :]
        w = load_weights(
            w_ptrs[:, None] + at, s_ptrs, n_mask[:, None], start, H, dtype, FORMAT, GROUP, False
        )
        acc += w.to(tl.float32) * x
        if GATED:
            w = load_weights(
                up_ptrs[:, None] + at, up_s_ptrs, n_mask[:, None], start, H,
                dtype, FORMAT, GROUP, False,
            )  # fmt: skip
            acc_up += w.to(tl.float32) * x
    out, up = tl.sum(acc, 1), tl.sum(acc_up, 1)
    if HAS_BIAS:
        bias_ptr += e * stride_be
        out += tl.load(bias_ptr + row, mask=n_mask, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias_ptr + up_row, mask=n_mask, other=0.0).to(tl.float32)
    out = glu(out, up, limit, alpha, ACTIVATION, GATED, HAS_LIMIT, HAS_ALPHA)
    act_ptrs = act_ptr + pair * I + column
    tl.store(act_ptrs, out.to(act_ptr.dtype.element_ty), mask=n_mask)


@triton.jit
def _prefetch_weights(
    w_ptr,
    ids_ptr,
    column,
    E,
    H,
    I,
    stride_we,
    stride_wn,
    TOPK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Bring what fills down_combine's pipeline into L2, before gate_up is complete.

    This reads nothing that gate_up writes. Weights and ids come from before the call, and gate_up,
    the call's first launch, starts when all of that is complete (it is not launched early itself).
    A prefetch returns no value, so a line that changed later would still be read as it then is.
    """
    line: tl.constexpr = LINE_BYTES // (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    lines: tl.constexpr = triton.next_power_of_2(STAGES) * BLOCK_K // line
    steps = tl.cdiv(I, BLOCK_K)
    step = tl.arange(0, lines) * line // BLOCK_K
    pair = step // steps
    k = (step - pair * steps) * BLOCK_K + tl.arange(0, lines) * line % BLOCK_K
    e = tl.load(ids_ptr + pair, mask=pair < TOPK, other=-1).to(tl.int64)
    valid = ((e >= 0) & (e < E) & (k < I))[None, :] & (column < H)[:, None]
    offset = (e * stride_we + k)[None, :] + column[:, None] * stride_wn
    prefetch(w_ptr + tl.where(valid, offset, 0))


@triton.jit
def _down_combine_kernel(
    act_ptr,  # [K, I]
    w_ptr,  # [E, H, I], rows contiguous, as FORMAT stores it
    scale_ptr,  # as FORMAT has it, or None
    bias_ptr,  # [E, H] or unused
    out_ptr,  # [1, H]
    ids_ptr,  # [K]
    weights_ptr,  # [K]
    E, H, I, stride_we, stride_wn, stride_be,
    TOPK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(H, BLOCK_N),); one token's K experts in order, so nothing is left to combine.

    The K loops over I are one loop: the pipeline does not drain between experts. Experts and their
    weights are picked from registers: loaded inside, they would cost every weight a stage.
    """
    pairs = tl.arange(0, triton.next_power_of_2(TOPK))
    experts = tl.load(ids_ptr + pairs, mask=pairs < TOPK, other=-1).to(tl.int64)
    used = (experts >= 0) & (experts < E)
    experts = tl.where(used, experts, -1)
    # A skipped pair's weight may be anything, NaN included: it must not be multiplied.
    weights = tl.load(weights_ptr + pairs, mask=used, other=0.0).to(tl.float32)
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = column < H
    steps = tl.cdiv(I, BLOCK_K)
    PACKED: tl.constexpr = packed(FORMAT)
    if PDL:
        _prefetch_weights(
            w_ptr, ids_ptr, column, E, H, I // PACKED, stride_we, stride_wn,
            TOPK, BLOCK_K // PACKED, STAGES,
        )  # fmt: skip
    pdl_wait(PDL)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for step in tl.range(0, TOPK * steps, num_stages=STAGES):
        pair = step // steps
        start = (step - pair * steps) * BLOCK_K
        k = start + tl.arange(0, BLOCK_K)
        e = tl.sum(tl.where(pairs == pair, experts, 0), 0)
        weight = tl.sum(tl.where(pairs == pair, weights, 0.0), 0)
        depth = tl.where(e >= 0, I, 0)
        a = tl.load(act_ptr + pair * I + k, mask=k < depth, other=0.0).to(tl.float32) * weight
        at = (start // PACKED + tl.arange(0, BLOCK_K // PACKED))[None, :]
        w_ptrs = w_ptr + e * stride_we + column[:, None] * stride_wn + at
        s_ptrs = scale_pointers(scale_ptr, e, H, I, column, FORMAT, GROUP, BLOCK_K)
        w = load_weights(w_ptrs, s_ptrs, n_mask[:, None], start, depth, dtype, FORMAT, GROUP, False)
        acc += w.to(tl.float32) * a[None, :]
    out = tl.sum(acc, 1)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + experts[:, None] * stride_be + column[None, :]
        bias = tl.load(bias_ptrs, mask=used[:, None] & n_mask[None, :], other=0.0).to(tl.float32)
        out += tl.sum(bias * weights[:, None], 0)
    tl.store(out_ptr + column, out.to(out_ptr.dtype.element_ty), mask=n_mask)

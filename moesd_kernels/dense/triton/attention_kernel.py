"""Attention over a ragged cache by blocks of keys: partial results and their combination.

A row is one query of one head. What a block of keys contributes to it, and the order in which
blocks are combined, depend on its position alone: blocks begin at multiples of BLOCK_N from
position 0. So a row's result is the same bits whichever rows share its tile, however many programs
share its keys, and whether a program combines blocks itself or leaves that to another launch.
Not run on a GPU yet.
"""

import triton
import triton.language as tl

from moesd_kernels.experts.triton.common import pdl_wait

LOG2E = tl.constexpr(1.4426950408889634)
# More than any position.
_FAR = tl.constexpr(0x3FFFFFFF)


@triton.jit
def _first_seen(position, window):
    """The first position that a query sees; 0 for one at a negative position, which sees none."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)


@triton.jit
def _start(sinks_ptr, head, HAS_SINKS: tl.constexpr):
    """(maximum, sum of weights) of a row before its first key; a sink is a score with no value."""
    if HAS_SINKS:
        top = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        total = tl.full(head.shape, 1.0, tl.float32)
    else:
        top = tl.full(head.shape, float("-inf"), tl.float32)
        total = tl.full(head.shape, 0.0, tl.float32)
    return top, total


@triton.jit
def _finite_or_zero(top):
    """What scores are reduced by: the maximum, or 0 where that is -inf and would give NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _merge(top, total, acc, block_top, block_total, block_acc, seen):
    """Take a block into rows ``[R]``, acc ``[R, Dv]``; one that a row does not see changes nothing.

    Products and sums are tied by hand: left to the compiler, two kernels might round differently.
    """
    new_top = tl.maximum(top, block_top)
    base = _finite_or_zero(new_top)
    old, new = tl.exp2(top - base), tl.exp2(block_top - base)
    new_total = tl.fma(total, old, block_total * new)
    olds = tl.broadcast_to(old[:, None], acc.shape)
    new_acc = tl.fma(acc, olds, block_acc * new[:, None])
    top, total = tl.where(seen, new_top, top), tl.where(seen, new_total, total)
    return top, total, tl.where(seen[:, None], new_acc, acc)


@triton.jit
def _result(total, acc, position):
    """The weighted mean of the values; 0 for padding."""
    out = acc * (1.0 / total)[:, None]
    return tl.where(position[:, None] < 0, 0.0, out)


@triton.jit
def _attend_block(q, k, v, visible, scale):
    """(maximum score, sum of weights, weighted values) of rows q ``[M, D]`` in a block of keys.

    Weights are rounded to v's dtype before they are summed, too. A value that is not finite would
    reach rows that do not see it, as 0 * NaN: instead it makes NaN of its key's score.
    """
    wide = v.to(tl.float32)
    whole = tl.sum(wide - wide, 1) == 0.0  # else NaN
    v = tl.where(whole[:, None], v, 0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(whole[None, :], scores, float("nan"))
    scores = tl.where(visible, scores, float("-inf"))
    top = tl.max(scores, 1)
    weights = tl.exp2(scores - _finite_or_zero(top)[:, None]).to(v.dtype)
    total = tl.sum(weights.to(tl.float32), 1)
    return top, total, tl.dot(weights, v, input_precision="ieee")


@triton.jit
def _rows_of_tile(
    positions_ptr,
    num_queries,
    num_tiles,
    kv_heads,
    length,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """(sequence, key head) of a program, and (query, head, position) of each row of its tile.

    Rows behind the last have position -1, as padding queries do, and head -1.
    """
    pair = tl.program_id(0) // num_tiles
    b, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    place = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query, live = place // GROUP, place < num_queries * GROUP
    head = tl.where(live, kv_head * GROUP + place % GROUP, -1)
    position = tl.load(positions_ptr + b * num_queries + query, mask=live, other=-1)
    return b, kv_head, query, head, tl.minimum(position, length - 1).to(tl.int32)


@triton.jit
def _load_rows(base, rows, stride, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``[R, BLOCK]``, zero where ``mask`` is not set and from column WIDTH on."""
    column = tl.arange(0, BLOCK)
    ptrs = base + rows[:, None] * stride + column[None, :]
    return tl.load(ptrs, mask=mask[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _store_rows(base, rows, tile, mask, WIDTH: tl.constexpr):
    """A ``[R, BLOCK]`` tile to the ``rows`` of a contiguous ``[.., WIDTH]`` tensor."""
    column = tl.arange(0, tile.shape[1])
    ptrs = base + rows[:, None] * WIDTH + column[None, :]
    mask = mask[:, None] & (column < WIDTH)[None, :]
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_queries", "num_tiles", "num_programs", "num_slots", "length"])
def _attend_kernel(
    q_ptr,  # [B, Q, Hkv * GROUP, D]
    k_ptr,  # [rows, S, Hkv, D]
    v_ptr,  # [rows, S, Hkv, DV]
    positions_ptr,  # [B, Q]
    rows_ptr,  # [B] or unused
    sinks_ptr,  # [Hkv * GROUP] or unused
    out_ptr,  # [B, Q, Hkv * GROUP, DV]; SPLIT: partial sums [B, Q, Hkv * GROUP, num_slots, DV] fp32
    stats_ptr,  # SPLIT: [B, Q, Hkv * GROUP, num_slots, 2] fp32, maximum and sum of weights
    scale,  # times log2(e)
    window, length, num_queries, num_tiles, num_programs, num_slots, kv_heads,
    stride_qb, stride_qq, stride_qh, stride_kr, stride_kp, stride_kh,
    stride_vr, stride_vp, stride_vh,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HAS_ROWS: tl.constexpr,
    HAS_SINKS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (B * Hkv * num_tiles, num_programs); a tile is BLOCK_M rows that share a key head.

    SPLIT, a program takes every num_programs-th block of a tile's keys and stores what each gives;
    otherwise it takes all blocks and stores the result.
    """
    pdl_wait(PDL)
    b, kv_head, query, head, position = _rows_of_tile(
        positions_ptr, num_queries, num_tiles, kv_heads, length, GROUP, BLOCK_M
    )
    first = _first_seen(position, window)
    low, high = tl.min(tl.where(position >= 0, first, _FAR)), tl.max(position)
    begin, end = low // BLOCK_N, (high + BLOCK_N) // BLOCK_N
    q_rows = query * stride_qq + head * stride_qh
    q = _load_rows(q_ptr + b * stride_qb, q_rows, 1, head >= 0, D, BLOCK_D)
    cache_row = tl.load(rows_ptr + b) if HAS_ROWS else b
    k_ptr += cache_row * stride_kr + kv_head * stride_kh
    v_ptr += cache_row * stride_vr + kv_head * stride_vh
    out_row = (b * num_queries + query) * (kv_heads * GROUP) + head
    top, total = _start(sinks_ptr, tl.maximum(head, 0), HAS_SINKS)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for block in range(begin + tl.program_id(1), end, num_programs):
        start = block * BLOCK_N
        key, offset = start + n, start.to(tl.int64)
        read = (key >= low) & (key <= high)
        k = _load_rows(k_ptr + offset * stride_kp, n, stride_kp, read, D, BLOCK_D)
        v = _load_rows(v_ptr + offset * stride_vp, n, stride_vp, read, DV, BLOCK_DV)
        visible = (key[None, :] >= first[:, None]) & (key[None, :] <= position[:, None])
        block_top, block_total, block_acc = _attend_block(q, k, v, visible, scale)
        seen = (position >= start) & (first < start + BLOCK_N)
        if SPLIT:
            slot = out_row * num_slots + block % num_slots
            tl.store(stats_ptr + 2 * slot, block_top, mask=seen)
            tl.store(stats_ptr + 2 * slot + 1, block_total, mask=seen)
            _store_rows(out_ptr, slot, block_acc, seen, DV)
        else:
            top, total, acc = _merge(top, total, acc, block_top, block_total, block_acc, seen)
    if not SPLIT:
        _store_rows(out_ptr, out_row, _result(total, acc, position), head >= 0, DV)


@triton.jit(do_not_specialize=["num_slots", "length"])
def _combine_blocks_kernel(
    partial_ptr,  # [B, Q, Hq, num_slots, DV] fp32
    stats_ptr,  # [B, Q, Hq, num_slots, 2] fp32
    positions_ptr,  # [B, Q]
    sinks_ptr,  # [Hq] or unused
    out_ptr,  # [B, Q, Hq, DV]
    window,
    length,
    num_slots,
    q_heads,
    DV: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UNROLL: tl.constexpr,  # blocks whose loads are in flight together
    PDL: tl.constexpr,
):
    """Grid: (B * Q * Hq,); a program combines the blocks of one row, in order."""
    pdl_wait(PDL)
    row = tl.program_id(0) + tl.zeros([1], tl.int64)
    position = tl.load(positions_ptr + row // q_heads)
    position = tl.minimum(position, length - 1).to(tl.int32)
    first = _first_seen(position, window)
    begin, end = tl.min(first) // BLOCK_N, (tl.max(position) + BLOCK_N) // BLOCK_N
    top, total = _start(sinks_ptr, (row % q_heads).to(tl.int32), HAS_SINKS)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    for group in range(begin, end, UNROLL):
        for i in tl.static_range(UNROLL):
            block = group + i
            seen = (block + tl.zeros([1], tl.int32)) < end
            slot = row * num_slots + block % num_slots
            block_top = tl.load(stats_ptr + 2 * slot, mask=seen, other=float("-inf"))
            block_total = tl.load(stats_ptr + 2 * slot + 1, mask=seen, other=0.0)
            block_acc = _load_rows(partial_ptr, slot, DV, seen, DV, BLOCK_DV)
            top, total, acc = _merge(top, total, acc, block_top, block_total, block_acc, seen)
    _store_rows(out_ptr, row, _result(total, acc, position), row >= 0, DV)

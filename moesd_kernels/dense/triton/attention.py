"""Ragged attention on a GPU: one launch over the keys, and one that combines where they are split.

How many programs share a row's keys is a matter of speed alone: results are the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moesd_kernels.experts.triton.device import device_of

from .attention_kernel import _attend_kernel, _combine_blocks_kernel
from .launch import check_floating, check_like, dependent_launch

MAX_HEAD_DIM = 256
NUM_WARPS = 8
UNROLL = 8  # partial sums that a row's combination loads together


@dataclass(frozen=True, slots=True)
class Plan:
    """How one call is cut up. Results depend on block_n alone, which depends on widths and dtype.

    Reasoned, not measured: a memory of 4.3 TB/s that answers after some 0.8 us is full with 3.4 MB
    under way, 26 KB on each of an H200's 132 multiprocessors. A block of 128 keys and values of 128
    bf16 is 64 KB, requested while the one before it is computed: one program a multiprocessor is
    enough, and its registers leave no room for two. At B = 8, Hkv = 8 and 1000 keys two programs
    share a tile, 128 in all, each with 4 blocks of 2 us. Of these the products take a fifth, and
    the 16 KB of partial sums that 32 rows give stay in L2. 32 rows are the most for which every
    architecture takes the instruction of 16 rows, whose results are the same whatever the tile.

    Attributes:
        block_m: rows (queries x heads of a key head) of a tile.
        block_n: keys of a block, the piece that partial sums are of.
        tiles: tiles of one sequence and key head.
        slots: blocks that one query may see, at most.
        programs: programs that share the blocks of a tile; 1 needs no partial sums.
        stages: of the loop over blocks: 3 to hold the next block, too, as far as memory allows.
    """

    block_m: int
    block_n: int
    tiles: int
    slots: int
    programs: int
    stages: int

    @classmethod
    def of(cls, q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, window: int) -> Plan:
        """The plan of a call on checked tensors, from sizes alone."""
        B, Q, q_heads, _ = q.shape
        kv_heads = k_cache.shape[2]
        device = device_of(q.device)
        width = max(block_width(q.shape[3]), block_width(v_cache.shape[3]))
        block_m, block_n = tile_of(q.dtype, width)
        tiles = triton.cdiv(Q * q_heads // kv_heads, block_m)
        slots = triton.cdiv(length, block_n)
        if window > 0:
            slots = min(slots, (window + block_n - 2) // block_n + 1)
        programs = num_programs(B * kv_heads * tiles, slots, device.sms)
        stages = num_stages(block_m, block_n, width * q.element_size(), device.shared_bytes)
        return cls(block_m, block_n, tiles, slots, programs, stages)


def tile_of(dtype: torch.dtype, width: int) -> tuple[int, int]:
    """(block_m, block_n) for rows of ``width`` values, a power of two."""
    if dtype == torch.float32:  # no matrix instruction: operands are held in registers
        return 16, 32
    return 32, 128 if width <= 128 else 64


def num_programs(tiles: int, slots: int, sms: int) -> int:
    """How many programs share a tile's blocks: about one program a multiprocessor in all.

    However long the cache is, no more of them than that find nothing behind a row's last position.
    """
    return max(1, min(slots, sms // tiles))


def num_stages(block_m: int, block_n: int, row_bytes: int, shared_bytes: int) -> int:
    """How many stages fit beside queries, weights and values without NaN, with 4 KB to spare."""
    for stages in (3, 2):
        if (2 * block_m + (2 * stages - 1) * block_n) * row_bytes + 4096 <= shared_bytes:
            return stages
    return 1


def block_width(width: int) -> int:
    """A head's width as tiles have it."""
    return max(16, triton.next_power_of_2(width))


def ragged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    sinks: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    length: int | None = None,
) -> Tensor:
    """Causal attention of Q queries per sequence over a KV cache indexed by position.

    Nothing is read of the cache but positions between the first and the last that the queries of a
    tile see. Indices are not checked, for that would wait for the device.

    Args:
        q: ``[B, Q, Hq, D]`` in float32, bfloat16 or float16, D up to 256.
        k_cache: ``[rows, S, Hkv, D]`` in q.dtype, contiguous in the last dimension; Hkv divides Hq.
        v_cache: ``[rows, S, Hkv, Dv]``, likewise, Dv up to 256.
        positions: ``[B, Q]`` int64. A query at p sees positions max(0, p - window + 1)..p; one at a
            negative position returns zeros.
        scale: multiplies the scores.
        window: sliding window; <= 0 for full attention.
        sinks: ``[Hq]`` logits that take part in the softmax's sum (gpt-oss).
        rows: ``[B]`` int64 cache row of each sequence; None for row b.
        length: above every position, S by default: fewer programs and less workspace, the same
            results. Queries at or beyond it are taken to stand at the last position before it.

    Returns:
        ``[B, Q, Hq, Dv]`` contiguous, in q.dtype; scores and sums in fp32, weights in q.dtype. What
        is not finite is NaN.

    Raises:
        TypeError, ValueError: dtypes or shapes differ from these.
    """
    _check(q, k_cache, v_cache, positions, sinks, rows)
    B, Q, q_heads, _ = q.shape
    out = torch.empty(B, Q, q_heads, v_cache.shape[3], dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    positions = positions.contiguous()
    length = k_cache.shape[1] if length is None else min(length, k_cache.shape[1])
    if sinks is not None:
        sinks = sinks.contiguous()
    plan = Plan.of(q, k_cache, v_cache, length, window)
    if plan.programs == 1:
        _attend(q, k_cache, v_cache, positions, scale, window, sinks, rows, length, plan, out, None)
        return out
    shape = (*out.shape[:3], plan.slots)
    partial = torch.empty(*shape, out.shape[3], dtype=torch.float32, device=q.device)
    stats = torch.empty(*shape, 2, dtype=torch.float32, device=q.device)
    _attend(q, k_cache, v_cache, positions, scale, window, None, rows, length, plan, partial, stats)
    _combine(partial, stats, positions, window, sinks, length, plan, out)
    return out


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    sinks: Tensor | None,
    rows: Tensor | None,
    length: int,
    plan: Plan,
    out: Tensor,
    stats: Tensor | None,
) -> None:
    """Write results to ``out``; with ``stats`` ``[B, Q, Hq, slots, 2]`` partial ones to both."""
    B, Q, q_heads, D = q.shape
    kv_heads, Dv = v_cache.shape[2:]
    _attend_kernel[(B * kv_heads * plan.tiles, plan.programs)](
        q,
        k_cache,
        v_cache,
        positions,
        positions if rows is None else rows,
        out if sinks is None else sinks,
        out,
        out if stats is None else stats,
        scale * math.log2(math.e),
        max(0, window),
        length,
        Q,
        plan.tiles,
        plan.programs,
        plan.slots,
        kv_heads,
        *q.stride()[:3],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        GROUP=q_heads // kv_heads,
        D=D,
        DV=Dv,
        HAS_ROWS=rows is not None,
        HAS_SINKS=sinks is not None,
        SPLIT=stats is not None,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BLOCK_D=block_width(D),
        BLOCK_DV=block_width(Dv),
        **dependent_launch(q.device),
        num_warps=NUM_WARPS,
        num_stages=plan.stages,
    )


def _combine(
    partial: Tensor,
    stats: Tensor,
    positions: Tensor,
    window: int,
    sinks: Tensor | None,
    length: int,
    plan: Plan,
    out: Tensor,
) -> None:
    B, Q, q_heads, Dv = out.shape
    _combine_blocks_kernel[(B * Q * q_heads,)](
        partial,
        stats,
        positions,
        out if sinks is None else sinks,
        out,
        max(0, window),
        length,
        plan.slots,
        q_heads,
        DV=Dv,
        HAS_SINKS=sinks is not None,
        BLOCK_N=plan.block_n,
        BLOCK_DV=block_width(Dv),
        UNROLL=UNROLL,
        **dependent_launch(out.device),
        num_warps=1,
    )


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    rows: Tensor | None,
) -> None:
    check_floating(q, "q")
    if q.dim() != 4:
        raise ValueError(f"q must be [B, Q, Hq, D], got {list(q.shape)}")
    B, Q, q_heads, D = q.shape
    for cache, name in ((k_cache, "k_cache"), (v_cache, "v_cache")):
        if cache.dim() != 4 or cache.stride(3) != 1:
            raise ValueError(
                f"{name} must be [rows, S, Hkv, D] with a contiguous last dimension, got "
                f"{list(cache.shape)} strides {list(cache.stride())}"
            )
        if cache.shape[3] > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dimension up to {MAX_HEAD_DIM}, got {cache.shape[3]}"
            )
    check_like(k_cache, "k_cache", [*k_cache.shape[:3], D], q.dtype)
    check_like(v_cache, "v_cache", [*k_cache.shape[:3], v_cache.shape[3]], q.dtype)
    kv_heads = k_cache.shape[2]
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"query heads must be a multiple of the key heads {kv_heads}, got {q_heads}"
        )
    check_like(positions, "positions", [B, Q], torch.int64)
    if sinks is not None and sinks.shape != (q_heads,):
        raise ValueError(f"sinks must be [{q_heads}], got {list(sinks.shape)}")
    if rows is not None:
        check_like(rows, "rows", [B], torch.int64)
    elif k_cache.shape[0] < B:
        raise ValueError(f"k_cache must have at least {B} rows, got {k_cache.shape[0]}")

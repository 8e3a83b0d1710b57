"""Routing plan on the device: which rows each block of BLOCK_M rows multiplies, no host involved.

Rows are the routed pairs ``t * K + k`` in stable order of their expert. A block is
``(expert, first sorted row, number of rows)``; blocks beyond the last have expert -1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import pdl_wait

# Ids a program holds in registers at a time.
CHUNK = 4096


@triton.jit
def _experts(ids_ptr, pair, num_pairs, E):
    """Expert of each pair; ids outside [0, E) fall into bin E, which no block is made of."""
    ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)


@triton.jit
def route_block(
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
):
    """Find ``block`` from the ids alone; write its rows and its table entry.

    The ids are CHUNKS times N_PAD; with one chunk the loops are none and ids are loaded once.
    Programs that find the same block write the same values, so they need no order among them;
    the barrier makes a program's own rows readable to it.
    """
    expert = tl.arange(0, E_PAD)
    count = tl.zeros([E_PAD], tl.int32)
    for chunk in range(CHUNKS):
        pair = chunk * N_PAD + tl.arange(0, N_PAD)
        count += tl.histogram(_experts(ids_ptr, pair, num_pairs, E), E_PAD)
    count = tl.where(expert < E, count, 0)
    blocks = (count + BLOCK_M - 1) // BLOCK_M
    block_end = tl.cumsum(blocks, 0)
    mine = (block >= block_end - blocks) & (block < block_end)
    found = tl.sum(mine.to(tl.int32), 0) > 0
    e = tl.where(found, tl.sum(tl.where(mine, expert, 0), 0), -1)
    row0 = (block - tl.sum(tl.where(mine, block_end - blocks, 0), 0)) * BLOCK_M
    first = tl.sum(tl.where(expert < e, count, 0), 0) + row0
    rows = tl.minimum(tl.sum(tl.where(mine, count, 0), 0) - row0, BLOCK_M)

    seen = 0
    for chunk in range(CHUNKS):
        pair = chunk * N_PAD + tl.arange(0, N_PAD)
        match = (_experts(ids_ptr, pair, num_pairs, E) == e).to(tl.int32)
        rank = seen + tl.cumsum(match, 0) - 1 - row0
        inside = (match > 0) & (rank >= 0) & (rank < rows)
        tl.store(sorted_to_pair_ptr + first + rank, pair, mask=inside)
        seen += tl.sum(match, 0)
    rows = tl.where(found, rows, 0)
    tl.store(blocks_ptr + block * 3 + 0, e)
    tl.store(blocks_ptr + block * 3 + 1, first)
    tl.store(blocks_ptr + block * 3 + 2, rows)
    tl.debug_barrier()
    return e, first, rows


@triton.jit(do_not_specialize=["num_pairs"])
def _plan_kernel(
    ids_ptr,  # [T * K]
    sorted_to_pair_ptr,  # [T * K]
    blocks_ptr,  # [num_blocks, 3]
    num_pairs,
    E,
    N_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (num_blocks,); each program finds one block and writes its rows and table entry."""
    pdl_wait(PDL)
    route_block(
        tl.program_id(0),
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


def max_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Most blocks any routing of ``num_pairs`` rows can make: the grid's static bound.

    Of A experts with rows, each has one block plus at most ``(count - 1) // block_m`` more.
    """
    active = min(num_pairs, num_experts)
    return active + (num_pairs - active) // block_m


def plan_sizes(num_pairs: int, num_experts: int) -> dict[str, int]:
    """Powers of two: N_PAD holds all pairs or a chunk, E_PAD all experts plus the spare bin."""
    return {
        "N_PAD": min(CHUNK, max(128, triton.next_power_of_2(num_pairs))),
        "E_PAD": max(32, triton.next_power_of_2(num_experts + 1)),
        "CHUNKS": triton.cdiv(num_pairs, CHUNK),
    }


def plan(
    topk_ids: Tensor, num_experts: int, block_m: int, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Launch the plan for ids ``[T, K]`` (contiguous); ``pdl`` lets the next launch start early.

    Returns:
        sorted_to_pair: ``[T * K]`` int32; entries past the last valid pair are not written.
        blocks: [max_blocks, 3] int32 of (expert or -1, first sorted row, rows).
    """
    num_pairs = topk_ids.numel()
    bound = max_blocks(num_pairs, num_experts, block_m)
    table = torch.empty(num_pairs + 3 * bound, dtype=torch.int32, device=topk_ids.device)
    sorted_to_pair, blocks = table[:num_pairs], table[num_pairs:]
    sizes = plan_sizes(num_pairs, num_experts)
    _plan_kernel[(bound,)](
        topk_ids,
        sorted_to_pair,
        blocks,
        num_pairs,
        num_experts,
        **sizes,
        BLOCK_M=block_m,
        PDL=pdl,
        num_warps=4 if sizes["N_PAD"] <= 2048 else 8,
    )
    return sorted_to_pair, blocks.view(bound, 3)

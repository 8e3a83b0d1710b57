"""Routing plan on the device: which rows each block of BLOCK_M rows multiplies, no host involved.

Rows are the routed pairs ``t * K + k`` in stable order of their expert. A block is
``(expert, first sorted row, number of rows)``; blocks beyond the last have expert -1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import pdl_wait


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
    BLOCK_M: tl.constexpr,
    STORE_BLOCK: tl.constexpr,
):
    """Find ``block`` from the ids alone; write its rows (and its table entry if STORE_BLOCK).

    Programs that find the same block write the same values, so they need no order among them;
    the barrier makes a program's own rows readable to it.
    """
    pair = tl.arange(0, N_PAD)
    ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
    # Ids outside [0, E) fall into bin E, which no block is made of.
    ids = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    expert = tl.arange(0, E_PAD)
    count = tl.where(expert < E, tl.histogram(ids, E_PAD), 0)
    blocks = (count + BLOCK_M - 1) // BLOCK_M
    block_end = tl.cumsum(blocks, 0)
    mine = (block >= block_end - blocks) & (block < block_end)
    found = tl.sum(mine.to(tl.int32), 0) > 0
    e = tl.where(found, tl.sum(tl.where(mine, expert, 0), 0), -1)
    row0 = (block - tl.sum(tl.where(mine, block_end - blocks, 0), 0)) * BLOCK_M
    first = tl.sum(tl.where(expert < e, count, 0), 0) + row0
    rows = tl.minimum(tl.sum(tl.where(mine, count, 0), 0) - row0, BLOCK_M)

    match = ids == e
    rank = tl.cumsum(match.to(tl.int32), 0) - 1 - row0
    inside = match & (rank >= 0) & (rank < rows)
    tl.store(sorted_to_pair_ptr + first + rank, pair, mask=inside)
    rows = tl.where(found, rows, 0)
    if STORE_BLOCK:
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
        BLOCK_M,
        True,
    )


def max_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Most blocks any routing of ``num_pairs`` rows can make: the grid's static bound.

    Of A experts with rows, each has one block plus at most ``(count - 1) // block_m`` more.
    """
    active = min(num_pairs, num_experts)
    return active + (num_pairs - active) // block_m


def plan_sizes(num_pairs: int, num_experts: int) -> tuple[int, int]:
    """The powers of two (N_PAD, E_PAD) that hold all pairs, and all experts plus the spare bin."""
    n_pad = max(128, triton.next_power_of_2(num_pairs))
    return n_pad, max(32, triton.next_power_of_2(num_experts + 1))


def plan(
    topk_ids: Tensor, num_experts: int, block_m: int, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Launch the plan for ids [T, K] (contiguous); ``pdl`` lets the next launch start early.

    Returns:
        sorted_to_pair: [T * K] int32; entries past the last valid pair are not written.
        blocks: [max_blocks, 3] int32 of (expert or -1, first sorted row, rows).
    """
    num_pairs = topk_ids.numel()
    bound = max_blocks(num_pairs, num_experts, block_m)
    table = torch.empty(num_pairs + 3 * bound, dtype=torch.int32, device=topk_ids.device)
    sorted_to_pair, blocks = table[:num_pairs], table[num_pairs:]
    n_pad, e_pad = plan_sizes(num_pairs, num_experts)
    _plan_kernel[(bound,)](
        topk_ids,
        sorted_to_pair,
        blocks,
        num_pairs,
        num_experts,
        N_PAD=n_pad,
        E_PAD=e_pad,
        BLOCK_M=block_m,
        PDL=pdl,
        num_warps=4 if n_pad <= 2048 else 8,
    )
    return sorted_to_pair, blocks.view(bound, 3)

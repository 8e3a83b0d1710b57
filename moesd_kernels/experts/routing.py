"""Which rows each expert gets: the routing plan, with shapes known before the data is.

Kernels that read an expert's weights once need its tokens side by side. The plan is a stable sort
of the (token, k) pairs by expert, cut into blocks that never mix two experts. All sizes follow
from T, K, E and the block size, so a plan can be made inside a CUDA graph or ``torch.compile``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """A routing plan for N = T * K pairs; pair ``p`` is choice ``p % K`` of token ``p // K``.

    Attributes:
        expert_offsets: ``[E + 1]`` int32. Expert e's pairs are the sorted rows from
            ``expert_offsets[e]`` up to ``expert_offsets[e + 1]``.
        sorted_to_pair: ``[N]`` int32, stable by (expert, pair). Rows from ``expert_offsets[E]`` on
            are the dropped pairs, whose id is not an expert.
        pair_to_sorted: ``[N]`` int32, the inverse permutation; -1 for a dropped pair.
        block_to_expert: [max_blocks] int32, the expert of each block; -1 for an idle block.
        block_to_row: [max_blocks] int32, the first sorted row of each block; idle blocks have 0.
    """

    expert_offsets: Tensor
    sorted_to_pair: Tensor
    pair_to_sorted: Tensor
    block_to_expert: Tensor
    block_to_row: Tensor


def max_blocks(num_pairs: int, num_experts: int, block_size: int) -> int:
    """Most blocks that any routing of ``num_pairs`` pairs can need.

    Worst case: every expert but one holds a single pair, the last one holds the rest.
    """
    spread = min(num_pairs, num_experts)
    return spread + (num_pairs - spread) // block_size


def plan_routing(topk_ids: Tensor, num_experts: int, block_size: int) -> Routing:
    """Sort pairs by expert and cut every expert's rows into blocks of at most ``block_size``.

    Args:
        topk_ids: ``[T, K]`` int32 or int64; ids outside [0, num_experts) are dropped.
        num_experts: E.
        block_size: rows per block, at least 1.

    Returns:
        A ``Routing`` on the device of ``topk_ids``; no host synchronisation.

    Raises:
        TypeError: ``topk_ids`` is not int32 or int64.
        ValueError: wrong rank, or a count below 1.
    """
    _check(topk_ids, num_experts, block_size)
    device, N = topk_ids.device, topk_ids.numel()
    ids = topk_ids.reshape(-1).to(torch.int64)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    sorted_ids, order = torch.sort(ids, stable=True)
    experts = torch.arange(num_experts + 1, device=device)
    offsets = torch.searchsorted(sorted_ids, experts)  # [E + 1]; offsets[E] = kept pairs

    rows = torch.arange(N, device=device)
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    inverse = torch.where(ids < num_experts, inverse, -1)

    blocks = (offsets.diff() + block_size - 1) // block_size  # [E]
    block_ends = blocks.cumsum(0)  # [E]
    index = torch.arange(max_blocks(N, num_experts, block_size), device=device)
    expert = torch.searchsorted(block_ends, index, right=True)  # E for idle blocks
    busy = expert < num_experts
    safe = expert.clamp(max=num_experts - 1)
    within = index - (block_ends - blocks)[safe]
    return Routing(
        expert_offsets=offsets.int(),
        sorted_to_pair=order.int(),
        pair_to_sorted=inverse.int(),
        block_to_expert=torch.where(busy, expert, -1).int(),
        block_to_row=torch.where(busy, offsets[safe] + within * block_size, 0).int(),
    )


def _check(topk_ids: Tensor, num_experts: int, block_size: int) -> None:
    if torch.compiler.is_compiling():
        return
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_ids.dim() != 2:
        raise ValueError(f"topk_ids must be [T, K], got shape {tuple(topk_ids.shape)}")
    if num_experts < 1 or block_size < 1:
        raise ValueError(
            "num_experts and block_size must be at least 1, "
            f"got num_experts={num_experts}, block_size={block_size}"
        )

"""Draws by exponential races, in two launches. Not run on a GPU yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait

from ..argmax_kernel import NOTHING, join_parts, order
from ..launch import check_like, dependent_launch
from .noise import exponential, fold, key_of

# Columns of a program: rows are parted by this alone, however many there are.
BLOCK = 2048
NUM_WARPS = 4


@triton.jit
def store_best(orders_ptr, places_ptr, part, scores, column, V):
    """Order and lowest place of the largest of a part's scores."""
    ordered = tl.where(column < V, order(scores), NOTHING)
    best = tl.max(ordered, 0)
    tl.store(orders_ptr + part, best)
    tl.store(places_ptr + part, tl.min(tl.where(ordered == best, column, 0x7FFFFFFF), 0))


@triton.jit
def _race_part_kernel(
    probs_ptr,  # [B, Q, V] fp32
    orders_ptr,  # [B * Q, PARTS] int32, likewise places
    places_ptr,
    rows_ptr,  # [B] int64, into the tables
    seeds_ptr,  # int64, likewise rounds
    rounds_ptr,
    positions_ptr,  # [B, Q] int64
    Q,
    V,
    STREAM: tl.constexpr,
    HAS_ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (B * Q, PARTS); the winner among BLOCK columns."""
    pdl_wait(PDL)
    position = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + position // Q)
    seed = tl.load(seeds_ptr + row)
    if HAS_ROUNDS:
        seed = fold(seed, tl.load(rounds_ptr + row))
    key = key_of(seed, tl.load(positions_ptr + position), STREAM)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    probs = tl.load(probs_ptr + position * V + column, mask=column < V, other=0.0)
    scores = tl.div_rn(probs, exponential(key, column))
    part = position * tl.num_programs(1) + tl.program_id(1)
    store_best(orders_ptr, places_ptr, part, scores, column, V)


def race(
    probs: Tensor,
    rows: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stream: int,
    rounds: Tensor | None = None,
) -> Tensor:
    """A draw from each of ``probs``: ``argmax(probs / Exp(key, v))``.

    Args:
        probs: ``[B, Q, V]`` fp32, not negative, with positive mass, not necessarily normalised.
        rows: ``[B]`` int64, places in the tables ``seeds`` and ``rounds``.
        seeds: ``[rows]`` int64.
        positions: ``[B, Q]`` int64, absolute.
        stream: of ``decoder.sampling.rng.Stream``.
        rounds: ``[rows]`` int64, folded into the seeds where given.

    Returns:
        ``[B, Q]`` int64; a token of probability 0 is never drawn.

    Raises:
        TypeError, ValueError: a dtype or shape other than these.
    """
    if probs.dim() != 3 or probs.shape[-1] == 0:
        raise ValueError(f"probs must be [B, Q, V] with V > 0, got {list(probs.shape)}")
    B, Q, V = probs.shape
    check_like(probs, "probs", [B, Q, V], torch.float32)
    check_like(rows, "rows", [B], torch.int64)
    check_like(positions, "positions", [B, Q], torch.int64)
    block = min(BLOCK, triton.next_power_of_2(V))
    parts = triton.cdiv(V, block)
    orders = torch.empty(B * Q, parts, dtype=torch.int32, device=probs.device)
    places = torch.empty_like(orders)
    if B * Q:
        _race_part_kernel[(B * Q, parts)](
            *(probs.contiguous(), orders, places, rows, seeds, rounds, positions.contiguous()),
            *(Q, V),
            STREAM=stream,
            HAS_ROUNDS=rounds is not None,
            BLOCK=block,
            **dependent_launch(probs.device),
            num_warps=NUM_WARPS,
        )
    return join_parts(orders, places)[0].view(B, Q)

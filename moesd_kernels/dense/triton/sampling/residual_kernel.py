"""Rejection sampling of a round, in three launches or, by block with a dense draft, four.

Of each sequence one row of the target's distributions and one of the draft's are read, however many
were drafted. Not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait

from ..argmax_kernel import NAN_ORDER, NOTHING
from ..launch import check_like, dependent_launch
from .accept_kernel import Accepted, accept, residue
from .noise import exponential
from .race_kernel import BLOCK, NUM_WARPS, store_best
from .verdict_kernel import store_verdict


@triton.jit
def _residual_part_kernel(
    target_ptr,  # [B, G + 1, V] fp32
    draft_ptr,  # [B, G, V] fp32
    tokens_ptr,  # [B, G] int64
    counts_ptr,  # [B], as Accepted, likewise the next three
    rejected_ptr,
    weights_ptr,
    keys_ptr,
    orders_ptr,  # [2, B, PARTS] int32, likewise places: of the residual, of the target
    places_ptr,
    G,
    V,
    HAS_DRAFT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (B, PARTS); two races with one noise: of the residual, and of all the target has."""
    pdl_wait(PDL)
    b = tl.program_id(0).to(tl.int64)
    accepted, rejected = tl.load(counts_ptr + b), tl.load(rejected_ptr + b)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target_ptrs = target_ptr + (b * (G + 1) + accepted) * V + column
    target = tl.load(target_ptrs, mask=column < V, other=0.0)
    if HAS_DRAFT:
        draft_ptrs = draft_ptr + (b * G + accepted) * V + column
        draft = tl.load(draft_ptrs, mask=column < tl.where(rejected, V, 0), other=0.0)
        left = tl.where(rejected, residue(target, draft, tl.load(weights_ptr + b)), target)
    else:
        token = tl.load(tokens_ptr + b * G + accepted, mask=rejected, other=-1)
        left = tl.where(column == token, 0.0, target)
    noise = exponential(tl.load(keys_ptr + b).to(tl.uint64), column)
    part = b * tl.num_programs(1) + tl.program_id(1)
    store_best(orders_ptr, places_ptr, part, tl.div_rn(left, noise), column, V)
    whole = part + tl.num_programs(0) * tl.num_programs(1)
    store_best(orders_ptr, places_ptr, whole, tl.div_rn(target, noise), column, V)


@triton.jit
def _winner(orders_ptr, places_ptr, row, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr):
    """Order and place of the largest of a row's parts."""
    part = tl.arange(0, PARTS_PAD)
    inside = part < PARTS
    ordered = tl.load(orders_ptr + row * PARTS + part, mask=inside, other=NOTHING)
    place = tl.load(places_ptr + row * PARTS + part, mask=inside, other=0x7FFFFFFF)
    best = tl.max(ordered, 0)
    return best, tl.min(tl.where(ordered == best, place, 0x7FFFFFFF), 0)


@triton.jit
def _residual_join_kernel(
    orders_ptr,  # [2, B, PARTS] int32, likewise places
    places_ptr,
    tokens_ptr,  # [B, G] int64
    counts_ptr,  # [B] int64
    out_ptr,  # [B, G + 1] int64
    G,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (B,); the target's own race where nothing is left of it, or nothing defined."""
    pdl_wait(PDL)
    b, B = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    best, left = _winner(orders_ptr, places_ptr, b, PARTS, PARTS_PAD)
    _, whole = _winner(orders_ptr, places_ptr, b + B, PARTS, PARTS_PAD)
    token = tl.where((best > 0) & (best != NAN_ORDER), left, whole).to(tl.int64)
    store_verdict(out_ptr, tokens_ptr, b, tl.load(counts_ptr + b), token, G, G_PAD)


def rejection(
    target_probs: Tensor,
    tokens: Tensor,
    draft_probs: Tensor | None,
    lengths: Tensor,
    undefined: Tensor | None,
    rows: Tensor,
    seeds: Tensor,
    rounds: Tensor,
    positions: Tensor,
    *,
    by_block: bool,
) -> tuple[Tensor, Tensor]:
    """Keeps drafts by rejection sampling and draws the token after them.

    Args:
        target_probs: ``[B, G + 1, V]`` fp32.
        tokens: ``[B, G]`` int64 drafts.
        draft_probs: ``[B, G, V]`` fp32, what they were drawn from; ``None`` where one-hot.
        lengths: ``[B]`` int64, how many of them are valid.
        undefined: ``[B, G + 1]`` bool, positions without a target, if known; drafts verified by
            block end before them.
        rows: ``[B]`` int64, places in the tables ``seeds`` and ``rounds``.
        seeds: ``[rows]`` int64.
        rounds: ``[rows]`` int64, folded into the seeds of the accept tests.
        positions: ``[B, G + 1]`` int64, absolute.
        by_block: block verification rather than draft by draft.

    Returns:
        Accepted counts ``[B]`` int64, and ``[B, G + 1]`` int64: the accepted drafts, the token
        after them, then -1.

    Raises:
        TypeError, ValueError: a dtype or shape other than these.
    """
    (B, G), V = tokens.shape, target_probs.shape[-1]
    check_like(target_probs, "target_probs", [B, G + 1, V], torch.float32)
    check_like(tokens, "tokens", [B, G], torch.int64)
    check_like(lengths, "lengths", [B], torch.int64)
    check_like(rows, "rows", [B], torch.int64)
    check_like(positions, "positions", [B, G + 1], torch.int64)
    if draft_probs is not None:
        check_like(draft_probs, "draft_probs", [B, G, V], torch.float32)
        draft_probs = draft_probs.contiguous()
    if undefined is not None:
        check_like(undefined, "undefined", [B, G + 1], torch.bool)
        undefined = undefined.contiguous()
    target_probs, tokens = target_probs.contiguous(), tokens.contiguous()
    out = torch.empty(B, G + 1, dtype=torch.int64, device=tokens.device)
    if B == 0:
        return torch.empty_like(lengths), out
    noise = (rows, seeds, rounds, positions.contiguous())
    given = (lengths.contiguous(), undefined, noise)
    accepted = accept(by_block, target_probs, tokens, draft_probs, *given)
    _draw_after(target_probs, tokens, draft_probs, accepted, out)
    return accepted.counts, out


def _draw_after(
    target_probs: Tensor,
    tokens: Tensor,
    draft_probs: Tensor | None,
    accepted: Accepted,
    out: Tensor,
) -> None:
    """Writes the verdict ``out`` ``[B, G + 1]``; the other arguments as in ``rejection``."""
    (B, G), V = tokens.shape, target_probs.shape[-1]
    block = min(BLOCK, triton.next_power_of_2(V))
    parts = triton.cdiv(V, block)
    orders = torch.empty(2, B, parts, dtype=torch.int32, device=tokens.device)
    places = torch.empty_like(orders)
    pdl = dependent_launch(tokens.device)
    _residual_part_kernel[(B, parts)](
        *(target_probs, draft_probs, tokens, *accepted, orders, places, G, V),
        HAS_DRAFT=draft_probs is not None,
        BLOCK=block,
        **pdl,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    _residual_join_kernel[(B,)](
        *(orders, places, tokens, accepted.counts, out, G),
        PARTS=parts,
        PARTS_PAD=max(32, triton.next_power_of_2(parts)),
        G_PAD=triton.next_power_of_2(G + 1),
        **pdl,
        num_warps=1,
    )

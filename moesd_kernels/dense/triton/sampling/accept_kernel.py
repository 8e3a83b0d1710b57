"""How many drafts rejection sampling keeps: standard and block verification. Not run on a GPU yet.

The rules are those of ``decoder.sampling.accept`` and ``block``, in the same precisions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait

from ..launch import dependent_launch
from .noise import ACCEPT, RESIDUAL, TARGET, fold, key_of, uniform
from .search import mass

BLOCK = 4096  # columns of a program that sums; sums are exact, so any number will do
NUM_WARPS = 4


class Accepted(NamedTuple):
    """What acceptance hands to the residual race.

    Attributes:
        counts: ``[B]`` int64.
        rejected: ``[B]`` bool, whether a draft followed the accepted ones.
        weights: ``[B]`` fp32, what the target is weighed with against that draft.
        keys: ``[B]`` int64, of the noise that draws the token after the accepted ones.
    """

    counts: Tensor
    rejected: Tensor
    weights: Tensor
    keys: Tensor


@triton.jit
def _ratio(target_ptr, draft_ptr, at, HAS_DRAFT: tl.constexpr):
    """fp64 ratio of a token's probabilities, 0 where the draft's is 0."""
    ratio = tl.load(target_ptr + at).to(tl.float64)
    if HAS_DRAFT:
        draft_x = tl.load(draft_ptr + at).to(tl.float64)
        ratio = tl.where(draft_x > 0, ratio / tl.where(draft_x > 0, draft_x, 1.0), 0.0)
    return ratio


@triton.jit
def _extend(weight, ratio):
    """``min(weight * ratio, 1)``, NaN where the product is."""
    product = weight * ratio
    return tl.where(product > 1.0, 1.0, product)


@triton.jit
def residue(target, draft, weight):
    """``(weight * target - draft)+`` of fp32 probabilities, NaN where that is."""
    left = target * weight - draft
    return tl.where(left < 0.0, 0.0, left)


@triton.jit
def _mass_kernel(
    target_ptr,  # [B, G + 1, V] fp32
    draft_ptr,  # [B, G, V] fp32
    tokens_ptr,  # [B, G] int64
    masses_ptr,  # [B, G - 1, PARTS] fp64
    G,
    V,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (B, G - 1, PARTS); a part of ``m_i`` of block verification."""
    pdl_wait(PDL)
    b, i, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    target_ptr += b * (G + 1) * V
    draft_ptr += b * G * V
    weight = tl.full([], 1.0, tl.float64)
    for j in range(0, i + 1):
        at = j * V + tl.load(tokens_ptr + b * G + j)
        weight = _extend(weight, _ratio(target_ptr, draft_ptr, at, True))
    column = part * BLOCK + tl.arange(0, BLOCK)
    after = (i + 1) * V + column
    target = tl.load(target_ptr + after, mask=column < V, other=0.0)
    draft = tl.load(draft_ptr + after, mask=column < V, other=0.0)
    total = tl.sum(mass(residue(target, draft, weight.to(tl.float32))))
    tl.store(masses_ptr + (b * (G - 1) + i) * tl.num_programs(2) + part, total)


@triton.jit
def _standard(
    target_ptr, draft_ptr, tokens_ptr, uniforms, length, G, V, HAS_DRAFT, G_PAD: tl.constexpr
):
    """Leading drafts of a row that pass ``uniform * draft_probs(x) < target_probs(x)``."""
    i = tl.arange(0, G_PAD)
    at = i * V + tl.load(tokens_ptr + i, mask=i < G, other=0)
    target_x = tl.load(target_ptr + at, mask=i < G, other=0.0).to(tl.float64)
    draft_x = tl.full([G_PAD], 1.0, tl.float64)
    if HAS_DRAFT:
        draft_x = tl.load(draft_ptr + at, mask=i < G, other=0.0).to(tl.float64)
    passed = (uniforms * draft_x < target_x) & (draft_x > 0) & (i < length)
    return tl.min(tl.where(passed, G_PAD, i), 0), tl.full([], 1.0, tl.float64)


@triton.jit
def _prefixes(target_ptr, draft_ptr, tokens_ptr, G, V, HAS_DRAFT, G_PAD: tl.constexpr):
    """A row's ``w_1 ... w_G``, and ``m_1 ... m_{G-1}`` of a one-hot draft, as ``[G_PAD]`` fp64."""
    i = tl.arange(0, G_PAD)
    weights, masses = tl.zeros([G_PAD], tl.float64), tl.zeros([G_PAD], tl.float64)
    weight = tl.full([], 1.0, tl.float64)
    for j in range(0, G):
        ratio = _ratio(target_ptr, draft_ptr, j * V + tl.load(tokens_ptr + j), HAS_DRAFT)
        masses = tl.where(i == j - 1, weight * (1.0 - ratio), masses)
        weight = _extend(weight, ratio)
        weights = tl.where(i == j, weight, weights)
    return weights, masses


@triton.jit
def _block(weights, masses, uniforms, length, G_PAD: tl.constexpr):
    """The longest prefix of a row whose own test passes, and ``w`` at it."""
    i = tl.arange(0, G_PAD)
    denominator = masses + (1.0 - weights)
    positive = denominator > 0
    rate = tl.where(positive, masses / tl.where(positive, denominator, 1.0), 1.0)
    rate = tl.where(i + 1 == length, weights, rate)
    accepted = tl.max(tl.where((uniforms <= rate) & (i < length), i + 1, 0), 0)
    weight = tl.sum(tl.where(i == accepted - 1, weights, 0.0), 0)
    return accepted, tl.where(accepted > 0, weight, 1.0)


@triton.jit
def _accept_kernel(
    target_ptr,  # [B, G + 1, V] fp32
    draft_ptr,  # [B, G, V] fp32
    tokens_ptr,  # [B, G] int64
    lengths_ptr,  # [B] int64
    undefined_ptr,  # [B, G + 1] bool
    masses_ptr,  # [B, G - 1, PARTS] fp64
    rows_ptr,  # [B] int64, into the tables
    seeds_ptr,  # int64, likewise rounds
    rounds_ptr,
    positions_ptr,  # [B, G + 1] int64
    counts_ptr,  # as Accepted, likewise the next three
    rejected_ptr,
    weights_ptr,
    keys_ptr,
    G,
    V,
    BY_BLOCK: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    HAS_UNDEFINED: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    G_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (B,)."""
    pdl_wait(PDL)
    b, i = tl.program_id(0).to(tl.int64), tl.arange(0, G_PAD)
    row, length = tl.load(rows_ptr + b), tl.load(lengths_ptr + b)
    seed, positions_ptr = tl.load(seeds_ptr + row), positions_ptr + b * (G + 1)
    noise = fold(seed, tl.load(rounds_ptr + row))
    positions = tl.load(positions_ptr + i, mask=i < G, other=0)
    uniforms = uniform(key_of(noise, positions, ACCEPT))
    target_ptr += b * (G + 1) * V
    tokens_ptr += b * G
    if HAS_DRAFT:
        draft_ptr += b * G * V
    if BY_BLOCK:
        if HAS_UNDEFINED:
            # Here what comes after a draft decides on it, too: it ends before what is undefined.
            undefined = tl.load(undefined_ptr + b * (G + 1) + i, mask=i < G, other=0)
            length = tl.minimum(length, tl.min(tl.where(undefined != 0, i, G_PAD), 0))
        weights, masses = _prefixes(target_ptr, draft_ptr, tokens_ptr, G, V, HAS_DRAFT, G_PAD)
        if HAS_DRAFT:
            masses = _joined(masses_ptr + b * (G - 1) * PARTS, G - 1, PARTS, PARTS_PAD, G_PAD)
        accepted, weight = _block(weights, masses, uniforms, length, G_PAD)
    else:
        accepted, weight = _standard(
            target_ptr, draft_ptr, tokens_ptr, uniforms, length, G, V, HAS_DRAFT, G_PAD
        )
    rejected, at = accepted < length, tl.load(positions_ptr + accepted)
    key = tl.where(rejected, key_of(seed, at, RESIDUAL), key_of(seed, at, TARGET))
    tl.store(counts_ptr + b, accepted.to(tl.int64))
    tl.store(rejected_ptr + b, rejected)
    tl.store(weights_ptr + b, weight.to(tl.float32))
    tl.store(keys_ptr + b, key.to(tl.int64))


@triton.jit
def _joined(masses_ptr, count, PARTS, PARTS_PAD: tl.constexpr, G_PAD: tl.constexpr):
    """A row's masses ``[G_PAD]`` from those of their parts."""
    i, part = tl.arange(0, G_PAD)[:, None], tl.arange(0, PARTS_PAD)[None, :]
    masses_ptrs = masses_ptr + i * PARTS + part
    return tl.sum(tl.load(masses_ptrs, mask=(i < count) & (part < PARTS), other=0.0), 1)


def accept(
    by_block: bool,
    target_probs: Tensor,
    tokens: Tensor,
    draft_probs: Tensor | None,
    lengths: Tensor,
    undefined: Tensor | None,
    noise: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Accepted:
    """Runs the rule; arguments are ``rejection``'s, contiguous, ``noise`` the last four of them."""
    B, G = tokens.shape
    V = target_probs.shape[-1]
    block = min(BLOCK, triton.next_power_of_2(V))
    parts = triton.cdiv(V, block)
    pdl = dependent_launch(tokens.device)
    masses = None
    if by_block and draft_probs is not None:
        masses = torch.empty(B, max(G - 1, 0), parts, dtype=torch.float64, device=tokens.device)
        if masses.numel():
            _mass_kernel[masses.shape](
                *(target_probs, draft_probs, tokens, masses, G, V),
                BLOCK=block,
                **pdl,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )
    out = Accepted(
        torch.empty(B, dtype=torch.int64, device=tokens.device),
        torch.empty(B, dtype=torch.bool, device=tokens.device),
        torch.empty(B, dtype=torch.float32, device=tokens.device),
        torch.empty(B, dtype=torch.int64, device=tokens.device),
    )
    _accept_kernel[(B,)](
        *(target_probs, draft_probs, tokens, lengths, undefined, masses, *noise, *out, G, V),
        BY_BLOCK=by_block,
        HAS_DRAFT=draft_probs is not None,
        HAS_UNDEFINED=undefined is not None,
        PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(parts),
        G_PAD=triton.next_power_of_2(G + 1),
        **pdl,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return out

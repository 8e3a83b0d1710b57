"""Softmax over the experts and its top-k in one launch behind the logits. Not run on a GPU yet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait

from .launch import check_floating, check_like, dependent_launch, rows_of

MAX_EXPERTS = 1024
MAX_TOPK = 32
# As `exp` of csrc/cpu/kernels/activation.h: below it all experts are equal, and the lower id leads.
LOWEST = tl.constexpr(-87.3)


@triton.jit
def best_experts(
    logits,  # [E_PAD] fp32, -inf from E on
    E: tl.constexpr,
    TOPK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    K_PAD: tl.constexpr,
):
    """(weights, ids) ``[K_PAD]`` of one token: its largest probability, TOPK times.

    Probabilities are not negative, so their bits order them; those taken become -1. A token without
    a softmax (a logit is NaN or infinite, or all are -inf) has a sum of NaN: its quotients are the
    one NaN that division makes, so they are taken in the order of ids.
    """
    E_PAD: tl.constexpr = logits.shape[0]
    expert, k = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    shifted = logits - tl.max(logits, 0)
    powers = tl.exp(tl.where(shifted < LOWEST, LOWEST, shifted))
    total = tl.sum(tl.where(expert < E, powers, 0.0), 0)
    probs = tl.div_rn(powers, tl.zeros([E_PAD], tl.float32) + total)
    left = tl.where(expert < E, probs.to(tl.int32, bitcast=True), -1)
    weights, ids = tl.zeros([K_PAD], tl.float32), tl.zeros([K_PAD], tl.int32)
    kept = 0.0
    for i in range(TOPK):
        best = tl.max(left, 0)
        chosen = tl.min(tl.where(left == best, expert, E_PAD), 0)
        prob = best.to(tl.float32, bitcast=True)
        weights = tl.where(k == i, prob, weights)
        ids = tl.where(k == i, chosen, ids)
        left = tl.where(expert == chosen, -1, left)
        kept += prob
    if RENORMALIZE:
        weights = tl.div_rn(weights, tl.zeros([K_PAD], tl.float32) + kept)
    return weights, ids.to(tl.int64)


@triton.jit
def _topk_kernel(
    logits_ptr,  # [T, E]
    weights_ptr,  # [T, TOPK]
    ids_ptr,  # [T, TOPK] int64
    stride_lt,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T,)."""
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    expert, k = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    logits_ptrs = logits_ptr + token * stride_lt + expert
    logits = tl.load(logits_ptrs, mask=expert < E, other=float("-inf")).to(tl.float32)
    weights, ids = best_experts(logits, E, TOPK, RENORMALIZE, K_PAD)
    weights = weights.to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + token * TOPK + k, weights, mask=k < TOPK)
    tl.store(ids_ptr + token * TOPK + k, ids, mask=k < TOPK)


def topk_of_logits(
    logits: Tensor, top_k: int, renormalize: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The largest ``top_k`` of each row's fp32 softmax, in descending order.

    Args:
        logits: ``[T, E]`` in float32, bfloat16 or float16; at most 1,024 experts.
        top_k: experts of a token, at most 32.
        renormalize: divide by the sum of those kept.
        dtype: of the weights, to which they are rounded.

    Returns:
        Weights ``[T, top_k]`` and ids ``[T, top_k]`` int64; among equal probabilities the
        lower id comes first. Of a row with NaN or inf, or of -inf alone, weights are NaN and ids
        0, 1, ….

    Raises:
        TypeError, ValueError: dtype or sizes differ from these.
    """
    check_floating(logits, "logits")
    T, E = logits.shape
    check_choice(E, top_k)
    weights = torch.empty(T, top_k, dtype=dtype, device=logits.device)
    ids = torch.empty(T, top_k, dtype=torch.int64, device=logits.device)
    if T == 0:
        return weights, ids
    rows = rows_of(logits)
    _topk_kernel[(T,)](
        rows,
        weights,
        ids,
        rows.stride(0),
        E=E,
        TOPK=top_k,
        RENORMALIZE=renormalize,
        E_PAD=max(32, triton.next_power_of_2(E)),
        K_PAD=triton.next_power_of_2(top_k),
        **dependent_launch(logits.device),
        num_warps=1,  # a reduction is then one instruction on 32-bit numbers
    )
    return weights, ids


def check_choice(E: int, top_k: int) -> None:
    """What the kernel can choose from.

    Raises:
        ValueError: too many experts, or of a token.
    """
    if E > MAX_EXPERTS:
        raise ValueError(f"there must be at most {MAX_EXPERTS} experts, got {E}")
    if not 1 <= top_k <= min(E, MAX_TOPK):
        raise ValueError(f"top_k must be in [1, {min(E, MAX_TOPK)}], got {top_k}")


def softmax_topk_router(
    x: Tensor, w: Tensor, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over x ``[T, H]`` times w ``[E, H]`` and its top_k, as transformers' TopKRouter
    classes.

    The logits are torch's product, rounded to x.dtype: a row of them may depend on how many rows
    there are.

    Returns:
        Logits ``[T, E]``, and weights and ids as ``topk_of_logits`` has them.

    Raises:
        TypeError, ValueError: as ``topk_of_logits``, or w is not like x.
    """
    check_like(w, "w", [w.shape[0], x.shape[-1]], x.dtype)
    logits = F.linear(x, w)
    return logits, *topk_of_logits(logits, top_k, renormalize)

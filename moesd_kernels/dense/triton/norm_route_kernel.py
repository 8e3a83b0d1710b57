"""The add and norm before a MoE block, and its softmax router, in one launch.

By itself the router is a product too small for its launch (128 experts of 2,048 columns are half a
megabyte) and a top-k behind it. Here the program that norms a token multiplies it with the router's
rows, which after the first program lie in the second-level cache. That grows with the tokens:
beyond a few hundred a matrix product is faster. Not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait, prefetch

from .launch import check_floating, check_like, dependent_launch, rows_of
from .norm_kernel import MAX_BLOCK, block_of, inverse_rms, store_normed
from .router_kernel import best_experts, check_choice

# Products that a program holds: 32 of each of 256 threads.
PRODUCTS = 8192
NUM_WARPS = 8


@triton.jit
def _norm_route_kernel(
    x_ptr,  # [T, H]
    delta_ptr,  # [T, H]
    w_ptr,  # [H]
    router_ptr,  # [E, H]
    sum_ptr,  # [T, H]
    normed_ptr,  # [T, H]
    weights_ptr,  # [T, TOPK]
    ids_ptr,  # [T, TOPK] int64
    stride_xt,
    stride_dt,
    eps,
    H: tl.constexpr,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T,); a program norms one row and chooses its experts."""
    if PDL:  # the weights are cold, and no launch of a step writes them
        prefetch(w_ptr + tl.minimum(tl.arange(0, BLOCK // 32) * 32, H - 1))
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xt
    delta_ptr += row * stride_dt
    column = tl.arange(0, BLOCK)
    x = block_of(x_ptr, delta_ptr, column, H, True)
    scale = inverse_rms(tl.sum(x * x, 0), eps, H)
    tl.store(sum_ptr + row * H + column, x.to(sum_ptr.dtype.element_ty), mask=column < H)
    store_normed(normed_ptr + row * H, x, scale, w_ptr, column, 0.0, H, True)

    expert = tl.arange(0, E_PAD)
    router_ptrs = router_ptr + expert[:, None] * H + tl.arange(0, BLOCK_K)[None, :]
    products = tl.zeros([E_PAD, BLOCK_K], tl.float32)
    dtype = normed_ptr.dtype.element_ty
    for start in range(0, H, BLOCK_K):
        # Once more from the cache, because a row in registers cannot be cut.
        k = start + tl.arange(0, BLOCK_K)
        piece = block_of(x_ptr, delta_ptr, k, H, True)
        weight = tl.load(w_ptr + k, mask=k < H, other=0.0).to(tl.float32)
        normed = ((piece * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
        mask = (expert < E)[:, None] & (k < H)[None, :]
        router = tl.load(router_ptrs + start, mask=mask, other=0.0, eviction_policy="evict_last")
        products += router.to(tl.float32) * normed[None, :]
    logits = tl.sum(products, 1).to(dtype).to(tl.float32)
    logits = tl.where(expert < E, logits, float("-inf"))
    weights, ids = best_experts(logits, E, TOPK, RENORMALIZE, K_PAD)
    place = tl.arange(0, K_PAD)
    weights = weights.to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + row * TOPK + place, weights, mask=place < TOPK)
    tl.store(ids_ptr + row * TOPK + place, ids, mask=place < TOPK)


def add_norm_route(
    x: Tensor,
    delta: Tensor,
    w: Tensor,
    eps: float,
    router: Tensor,
    top_k: int,
    renormalize: bool,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``add_rms_norm`` and ``softmax_topk_router`` of its result.

    Args:
        x: ``[T, H]``, H at most 16,384; delta: likewise.
        w: ``[H]`` the norm's weight.
        eps: of the norm.
        router: ``[E, H]`` contiguous.
        top_k: experts of a token.
        renormalize: divide their weights by their sum.
        dtype: of the weights.

    Returns:
        ``x + delta`` and its norm, ``[T, H]``; weights and ids ``[T, top_k]``.

    Raises:
        TypeError, ValueError: dtypes or sizes differ from these.
    """
    _check(x, delta, w, router, top_k)
    T, (E, H) = x.shape[0], router.shape
    total, normed = torch.empty(2, T, H, dtype=x.dtype, device=x.device)
    weights = torch.empty(T, top_k, dtype=dtype, device=x.device)
    ids = torch.empty(T, top_k, dtype=torch.int64, device=x.device)
    if T == 0:
        return total, normed, weights, ids
    rows, added = rows_of(x), rows_of(delta)
    e_pad = max(32, triton.next_power_of_2(E))
    _norm_route_kernel[(T,)](
        rows,
        added,
        w.contiguous(),
        router.contiguous(),
        total,
        normed,
        weights,
        ids,
        rows.stride(0),
        added.stride(0),
        float(eps),
        H=H,
        E=E,
        TOPK=top_k,
        RENORMALIZE=renormalize,
        BLOCK=max(64, triton.next_power_of_2(H)),
        E_PAD=e_pad,
        BLOCK_K=min(256, max(16, PRODUCTS // e_pad)),
        K_PAD=triton.next_power_of_2(top_k),
        **dependent_launch(x.device),
        num_warps=NUM_WARPS,
    )
    return total, normed, weights, ids


def _check(x: Tensor, delta: Tensor, w: Tensor, router: Tensor, top_k: int) -> None:
    check_floating(x, "x")
    T, H = x.shape
    check_like(delta, "delta", [T, H], x.dtype)
    check_like(w, "w", [H], x.dtype)
    check_like(router, "router", [router.shape[0], H], x.dtype)
    check_choice(router.shape[0], top_k)
    if H > MAX_BLOCK:
        raise ValueError(f"rows must have at most {MAX_BLOCK} columns, got {H}")

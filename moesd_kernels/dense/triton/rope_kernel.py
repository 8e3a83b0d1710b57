"""From the joined projection to attention's inputs, all heads in one launch. Not run on a GPU yet.

Rounds where ``csrc/cpu/kernels/rope_kernel.h`` rounds, that is where transformers' separate
operations do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait

from .launch import check_floating, check_like, dependent_launch
from .norm_kernel import inverse_rms

# Values of a program, about: heads of a group times their dimensions.
GROUP_VALUES = 512


@triton.jit
def _rotate_heads(
    x_ptr,  # the first head of all
    out_ptr,
    norm_ptr,
    eps,
    cos_ptr,
    sin_ptr,
    head,  # [G]
    inside,  # [G] heads that are there
    D: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """n * cos + (-n's second half, n's first half) * sin, where n is the head or its RMS norm."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, HALF_PAD)
    column = d[None, :]
    mask = inside[:, None] & (column < HALF)
    at = head[:, None] * D + column
    dtype = out_ptr.dtype.element_ty
    a = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = inverse_rms(tl.sum(a * a + b * b, 1), eps, D)[:, None]
        a = (a * scale).to(dtype).to(tl.float32)
        b = (b * scale).to(dtype).to(tl.float32)
        a *= tl.load(norm_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        b *= tl.load(norm_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    cos = tl.load(cos_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    turned = (a * cos).to(dtype).to(tl.float32) - (b * sin).to(dtype).to(tl.float32)
    tl.store(out_ptr + at, turned.to(dtype), mask=mask)
    cos = tl.load(cos_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    turned = (b * cos).to(dtype).to(tl.float32) + (a * sin).to(dtype).to(tl.float32)
    tl.store(out_ptr + at + HALF, turned.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rope_kernel(
    qkv_ptr,  # [T, (Q_HEADS + 2 * KV_HEADS) * D]
    cos_ptr,  # [T, D], likewise sin
    sin_ptr,
    q_norm_ptr,  # [D] or unused, likewise k_norm
    k_norm_ptr,
    index_ptr,  # [T]
    q_ptr,  # [T, Q_HEADS * D]
    keys_ptr,  # [num_rows, KV_HEADS * D], likewise values
    values_ptr,
    num_rows,
    q_eps, k_eps, stride_xt, stride_ct, stride_st, stride_kr, stride_vr,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF_PAD: tl.constexpr,
    GROUP: tl.constexpr, HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (T, groups of query heads + groups of key heads); the latter copy the values, too.

    A token whose index lies outside the cache writes nothing there.
    """
    pdl_wait(PDL)
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    qkv_ptr += token * stride_xt
    cos_ptr += token * stride_ct
    sin_ptr += token * stride_st
    Q_GROUPS: tl.constexpr = (Q_HEADS + GROUP - 1) // GROUP
    if group < Q_GROUPS:
        head = group * GROUP + tl.arange(0, GROUP)
        q_ptr += token * Q_HEADS * D
        _rotate_heads(
            qkv_ptr, q_ptr, q_norm_ptr, q_eps, cos_ptr, sin_ptr,
            head, head < Q_HEADS, D, HALF_PAD, HAS_Q_NORM,
        )  # fmt: skip
    else:
        head = (group - Q_GROUPS) * GROUP + tl.arange(0, GROUP)
        row = tl.load(index_ptr + token)
        inside = head < tl.where((row >= 0) & (row < num_rows), KV_HEADS, 0)
        _rotate_heads(
            qkv_ptr + Q_HEADS * D, keys_ptr + row * stride_kr, k_norm_ptr, k_eps, cos_ptr, sin_ptr,
            head, inside, D, HALF_PAD, HAS_K_NORM,
        )  # fmt: skip
        d = tl.arange(0, 2 * HALF_PAD)
        at = head[:, None] * D + d[None, :]
        mask = inside[:, None] & (d < D)[None, :]
        value = tl.load(qkv_ptr + (Q_HEADS + KV_HEADS) * D + at, mask=mask)
        tl.store(values_ptr + row * stride_vr + at, value, mask=mask)


def rope_to_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    q_eps: float,
    k_weight: Tensor | None,
    k_eps: float,
    index: Tensor,
    q_heads: int,
    kv_heads: int,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Per-head norms and rotary positions of a joined projection; keys and values go to the cache.

    Args:
        qkv: ``[T, (Hq + 2 Hkv) * D]`` in float32, bfloat16 or float16: query heads, key heads,
            value heads. Adjacent columns, as in all of these.
        cos: ``[T, D]`` in qkv.dtype, of each token's position; sin: likewise.
        q_weight: ``[D]`` of the query heads' RMS norm, or None; k_weight: the keys'.
        q_eps: of that norm; k_eps: likewise.
        index: ``[T]`` int64 contiguous, the cache row of each token. One outside of the cache is
            not written: a check would have to wait for the device.
        q_heads: Hq; kv_heads: Hkv.
        keys: [rows, Hkv * D] in qkv.dtype, written at ``index``; values: likewise.

    Returns:
        Queries ``[T, Hq, D]`` contiguous.

    Raises:
        TypeError, ValueError: dtypes, shapes or strides differ from these.
    """
    T, D = cos.shape
    _check(qkv, cos, sin, q_weight, k_weight, index, q_heads, kv_heads, keys, values)
    q = torch.empty(T, q_heads, D, dtype=qkv.dtype, device=qkv.device)
    if T == 0:
        return q
    half_pad = max(16, triton.next_power_of_2(D // 2))
    group = max(1, GROUP_VALUES // (2 * half_pad))
    _rope_kernel[(T, triton.cdiv(q_heads, group) + triton.cdiv(kv_heads, group))](
        *(qkv, cos, sin),
        qkv if q_weight is None else q_weight,
        qkv if k_weight is None else k_weight,
        *(index, q, keys, values),
        *(keys.shape[0], float(q_eps), float(k_eps)),
        *(x.stride(0) for x in (qkv, cos, sin, keys, values)),
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        D=D,
        HALF_PAD=half_pad,
        GROUP=group,
        HAS_Q_NORM=q_weight is not None,
        HAS_K_NORM=k_weight is not None,
        **dependent_launch(qkv.device),
        num_warps=2,
        enable_fp_fusion=False,  # in fp32, too, products are rounded before their sum
    )
    return q


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    index: Tensor,
    q_heads: int,
    kv_heads: int,
    keys: Tensor,
    values: Tensor,
) -> None:
    check_floating(qkv, "qkv")
    T, D = cos.shape
    if D % 2 or D == 0:
        raise ValueError(f"the head dimension must be even and positive, got {D}")
    if q_heads < 1 or kv_heads < 1:
        raise ValueError(f"heads must be positive, got {q_heads} and {kv_heads}")
    check_like(qkv, "qkv", [T, (q_heads + 2 * kv_heads) * D], qkv.dtype)
    check_like(cos, "cos", [T, D], qkv.dtype)
    check_like(sin, "sin", [T, D], qkv.dtype)
    for norm, name in ((q_weight, "q_weight"), (k_weight, "k_weight")):
        if norm is not None:
            check_like(norm, name, [D], qkv.dtype)
    check_like(index, "index", [T], torch.int64)
    check_like(keys, "keys", [keys.shape[0], kv_heads * D], qkv.dtype)
    check_like(values, "values", keys.shape, qkv.dtype)
    named = {"qkv": qkv, "cos": cos, "sin": sin, "index": index, "keys": keys, "values": values}
    named |= {k: v for k, v in (("q_weight", q_weight), ("k_weight", k_weight)) if v is not None}
    for name, tensor in named.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have adjacent columns, got strides {tensor.stride()}")

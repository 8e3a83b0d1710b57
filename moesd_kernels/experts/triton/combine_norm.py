"""What a decoder layer does after its experts, in one launch: combine, shared expert, add, norm.

Not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine_kernel import experts_sum
from .common import pdl_wait


@dataclass(frozen=True, slots=True)
class After:
    """The rest of a layer, up to the norm before the next one.

    Attributes:
        stream: ``[T, H]`` the residual stream, to which the block's output is added.
        norm: ``[H]`` weight of the RMS norm of that sum.
        eps: of the norm.
        shared: ``[T, H]`` output of a shared expert, or None.
        gate: ``[H]`` the shared expert's gate: its sigmoid is the share of ``shared``.
    """

    stream: Tensor
    norm: Tensor
    eps: float
    shared: Tensor | None = None
    gate: Tensor | None = None


@triton.jit(do_not_specialize=["num_pairs"])
def _combine_norm_kernel(
    partial_ptr,  # [SPLIT_K, T * K, H] fp32, or with SUMMED [T, H], already combined
    ids_ptr,  # [T * K]
    weights_ptr,  # [T * K]
    x_ptr,  # [T, H] the residual stream
    states_ptr,  # [T, H] what the experts were given; only with SHARED, like the next two
    shared_ptr,  # [T, H] the shared expert's output
    gate_ptr,  # [H] the row of its gate
    norm_ptr,  # [H]
    stream_ptr,  # [T, H] out: x + the block's output
    normed_ptr,  # [T, H] out: the norm of it
    num_pairs,
    E,
    H,
    eps,
    TOPK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SUMMED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T,); one token's row stays in registers from the experts' sum to the norm.

    Every step rounds to the storage type where transformers' separate operations do.
    """
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    mask = column < H
    dtype = stream_ptr.dtype.element_ty
    row = token * H + column
    if SUMMED:
        out = tl.load(partial_ptr + row, mask=mask, other=0.0).to(tl.float32)
    else:
        out = experts_sum(
            partial_ptr, ids_ptr, weights_ptr, token, column, num_pairs, E, H, TOPK, SPLIT_K
        )
    out = out.to(dtype).to(tl.float32)
    if SHARED:
        states = tl.load(states_ptr + row, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + column, mask=mask, other=0.0).to(tl.float32)
        logit = tl.sum(states * gate, 0).to(dtype).to(tl.float32)
        share = (1.0 / (1.0 + tl.exp(-logit))).to(dtype).to(tl.float32)
        shared = tl.load(shared_ptr + row, mask=mask, other=0.0).to(tl.float32)
        shared = (shared * share).to(dtype).to(tl.float32)
        out = (out + shared).to(dtype).to(tl.float32)
    x = tl.load(x_ptr + row, mask=mask, other=0.0).to(tl.float32)
    stream = (x + out).to(dtype)
    tl.store(stream_ptr + row, stream, mask=mask)
    stream = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(stream * stream, 0) / H + eps)
    weight = tl.load(norm_ptr + column, mask=mask, other=0.0).to(tl.float32)
    normed = (stream * scale).to(dtype).to(tl.float32) * weight
    tl.store(normed_ptr + row, normed.to(dtype), mask=mask)


def combine_norm(
    partial: Tensor,
    ids: Tensor,
    weights: Tensor,
    states: Tensor,
    E: int,
    after: After,
    launch: dict[str, bool],
) -> tuple[Tensor, Tensor]:
    """``after`` of the experts' partial sums.

    Args:
        partial: ``[SPLIT_K, T * K, H]`` fp32, or ``[T, H]`` where they are combined already.
        ids, weights: ``[T, K]``.
        states: ``[T, H]`` what the experts were given; a shared expert's gate reads it.
        launch: arguments of programmatic dependent launch.

    Returns:
        The stream with the block's output, and its norm, both ``[T, H]``.
    """
    stream, shared = after.stream, after.shared
    T, H = stream.shape
    summed = partial.dim() == 2
    new, normed = torch.empty_like(stream), torch.empty_like(stream)
    block_h = triton.next_power_of_2(H)
    _combine_norm_kernel[(T,)](
        partial,
        ids,
        weights,
        stream,
        states,
        stream if shared is None else shared,
        after.norm if after.gate is None else after.gate,
        after.norm,
        new,
        normed,
        ids.numel(),
        E,
        H,
        after.eps,
        TOPK=ids.shape[1],
        SPLIT_K=1 if summed else partial.shape[0],
        SUMMED=summed,
        SHARED=shared is not None,
        BLOCK_H=block_h,
        **launch,
        num_warps=min(16, max(1, block_h // 512)),
    )
    return new, normed

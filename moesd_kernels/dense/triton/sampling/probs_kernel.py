"""From logits to the distribution a token is drawn from, in one launch. Not run on a GPU yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait

from ..argmax_kernel import LOWEST_ORDER, NAN_ORDER, NOTHING, order
from ..launch import check_floating, check_like, dependent_launch, rows_of
from .search import last_kept, mass, value_of

BLOCK = 4096  # 8 values of each of 512 threads, in flight together
NUM_WARPS = 16


@triton.jit
def _scale(logits_ptr, out_ptr, temperature, V, BLOCK: tl.constexpr):
    """Writes logits by temperature; order of the largest, and its lowest place."""
    best = tl.full([BLOCK], NOTHING, tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
        x = tl.div_rn(x, tl.zeros_like(x) + temperature)
        tl.store(out_ptr + column, x, mask=column < V)
        ordered = tl.where(column < V, order(x), NOTHING)
        place = tl.where(ordered > best, column, place)
        best = tl.maximum(best, ordered)
    top = tl.max(best)
    return top, tl.min(tl.where(best == top, place, 0x7FFFFFFF))


@triton.jit
def _exponentials(out_ptr, largest, kth, V, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """``exp(x - largest)`` over values of order ``kth`` or more, else 0; their fp32 sum.

    A sum of integers, so that it is exact; V exponentials of at most SCALE fit 63 bits.
    """
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(out_ptr + column, mask=column < V, other=float("-inf"))
        power = tl.where(order(x) >= kth, tl.exp(x - largest), 0.0)
        tl.store(out_ptr + column, power, mask=column < V)
        total += (power * SCALE).to(tl.int64)
    return tl.sum(total).to(tl.float32) * (1.0 / SCALE)


@triton.jit
def _mass_from(out_ptr, least, V, BLOCK: tl.constexpr):
    """Exact sum of the probabilities of ``least`` or more, rounded to fp32."""
    kept = tl.zeros([BLOCK], tl.float64)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(out_ptr + column, mask=column < V, other=0.0)
        kept += mass(tl.where(x >= least, x, 0.0))
    return tl.sum(kept).to(tl.float32)


@triton.jit
def _divide(out_ptr, least, total, V, BLOCK: tl.constexpr):
    """Divides what is ``least`` or more by ``total``; the rest becomes 0."""
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(out_ptr + column, mask=column < V, other=0.0)
        x = tl.where(x >= least, tl.div_rn(x, tl.zeros_like(x) + total), 0.0)
        tl.store(out_ptr + column, x, mask=column < V)


@triton.jit
def _write_undrawn(out_ptr, greedy, place, V, BLOCK: tl.constexpr):
    """A row that needs no distribution: one-hot at ``place`` where greedy, NaN where undefined."""
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        one_hot = tl.where(column == place, 1.0, 0.0)
        tl.store(out_ptr + column, tl.where(greedy, one_hot, float("nan")), mask=column < V)


@triton.jit
def _probs_kernel(
    logits_ptr,  # [B * Q, V]
    out_ptr,  # [B * Q, V] fp32
    undefined_ptr,  # [B * Q] bool
    rows_ptr,  # [B] int64, into the tables below
    greedy_ptr,  # bool
    temperature_ptr,  # fp32, likewise top_p and min_p
    top_k_ptr,  # int64
    top_p_ptr,
    min_p_ptr,
    stride_lr,
    Q,
    V,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (B * Q,); each program a row, over which it passes as often as its rules need.

    Between passes, a barrier: a thread may read what another one has written.
    """
    pdl_wait(PDL)
    position = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + position // Q)
    greedy = tl.load(greedy_ptr + row).to(tl.int1)
    temperature = tl.load(temperature_ptr + row)
    out_ptr += position * V
    top, place = _scale(logits_ptr + position * stride_lr, out_ptr, temperature, V, BLOCK)
    nothing = (top == NAN_ORDER) | (top == LOWEST_ORDER)
    undefined = nothing | ((value_of(top) == float("inf")) & (greedy == 0))
    tl.store(undefined_ptr + position, undefined)
    tl.debug_barrier()
    if greedy | undefined:
        _write_undrawn(out_ptr, greedy, place, V, BLOCK)
    else:
        k = tl.load(top_k_ptr + row)
        lowest = tl.where(k < V, LOWEST_ORDER, top).to(tl.int64)
        kth = last_kept(out_ptr, V, lowest, top.to(tl.int64), k, True, BLOCK)
        kth = tl.where(k < V, kth, LOWEST_ORDER)
        tl.debug_barrier()
        total = _exponentials(out_ptr, value_of(top), kth, V, SCALE, BLOCK)
        tl.debug_barrier()
        _divide(out_ptr, 0.0, total, V, BLOCK)
        tl.debug_barrier()
        most = tl.div_rn(1.0, total)
        top_p = tl.load(top_p_ptr + row)
        highest = tl.where(top_p > 1.0, 0, order(most)).to(tl.int64)
        last = last_kept(out_ptr, V, highest * 0, highest, top_p.to(tl.float64), False, BLOCK)
        least = tl.maximum(tl.load(min_p_ptr + row) * most, value_of(last))
        if least > 0.0:
            kept = _mass_from(out_ptr, least, V, BLOCK)
            tl.debug_barrier()
            _divide(out_ptr, least, kept, V, BLOCK)


def probs(
    logits: Tensor,
    rows: Tensor,
    greedy: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """Probabilities after temperature, top-k, top-p and min-p, each a threshold on values.

    Tokens that tie with the last one kept are kept. A row costs what its own rules ask for.

    Args:
        logits: ``[B, Q, V]`` float32, bfloat16 or float16, already penalised.
        rows: ``[B]`` int64, places in the tables that follow.
        greedy: ``[rows]`` bool; such a row is one-hot at its largest logit, the first of equals.
        temperature: ``[rows]`` fp32.
        top_k: ``[rows]`` int64; V or more keeps all.
        top_p: ``[rows]`` fp32; above 1 keeps all.
        min_p: ``[rows]`` fp32; 0 keeps all.

    Returns:
        ``[B, Q, V]`` fp32, and ``[B, Q]`` bool: positions whose logits define no distribution (NaN,
        every token banned, or +inf in a sampled row). A sampled row's are NaN there.

    Raises:
        TypeError, ValueError: a dtype or shape other than these.
    """
    check_floating(logits, "logits")
    if logits.dim() != 3 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [B, Q, V] with V > 0, got {list(logits.shape)}")
    B, Q, V = logits.shape
    check_like(rows, "rows", [B], torch.int64)
    out = torch.empty(B, Q, V, dtype=torch.float32, device=logits.device)
    undefined = torch.empty(B, Q, dtype=torch.bool, device=logits.device)
    if out.numel() == 0:
        return out, undefined
    matrix = rows_of(logits)
    _probs_kernel[(B * Q,)](
        *(matrix, out, undefined, rows, greedy, temperature, top_k, top_p, min_p),
        *(matrix.stride(0), Q, V),
        SCALE=2.0 ** (62 - (V - 1).bit_length()),
        BLOCK=min(BLOCK, triton.next_power_of_2(V)),
        **dependent_launch(logits.device),
        num_warps=NUM_WARPS,
    )
    return out, undefined

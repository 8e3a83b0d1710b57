"""The gated RMS norm behind a recurrence, in one launch. Not run on a GPU yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait

from ..launch import check_floating, check_like, dependent_launch, rows_of
from ..norm_kernel import inverse_rms
from .launch import check_multiple

MAX_GROUP = 16384  # held in registers


@triton.jit
def _gated_norm_kernel(
    x_ptr,  # [T, H]
    gate_ptr,  # [T, H]
    w_ptr,  # [H], or [GROUP] where W_OF_GROUP
    out_ptr,  # [T, H]
    H,
    stride_xt,
    stride_gt,
    eps,
    GROUP: tl.constexpr,
    W_OF_GROUP: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    SIGMOID: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T, H / GROUP); a program norms one group of a row."""
    pdl_wait(PDL)
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * GROUP
    column = tl.arange(0, BLOCK)
    inside = column < GROUP
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * stride_xt + first + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gt + first + column, mask=inside, other=0.0)
    gate = gate.to(tl.float32)
    opened = 1.0 / (1.0 + tl.exp(-gate)) if SIGMOID else gate / (1.0 + tl.exp(-gate))
    if GATE_FIRST:
        x *= opened
    w = tl.load(w_ptr + (0 if W_OF_GROUP else first) + column, mask=inside, other=0.0)
    normed = x * inverse_rms(tl.sum(x * x, 0), eps, GROUP)
    if CAST_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    normed *= w.to(tl.float32)
    if not GATE_FIRST:
        if CAST_FIRST:
            normed = normed.to(dtype).to(tl.float32)
        normed *= opened
    tl.store(out_ptr + row * H + first + column, normed.to(dtype), mask=inside)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    w: Tensor,
    eps: float,
    group: int,
    gate_first: bool,
    cast_first: bool,
    activation: str,
) -> Tensor:
    """``dense.recurrent.gated_rms_norm`` on a GPU; arguments and result are as there.

    Raises:
        TypeError, ValueError: dtypes, shapes or the activation differ from these.
    """
    check_floating(x, "x")
    check_like(gate, "gate", x.shape, x.dtype)
    H = x.shape[-1]
    if not 1 <= group <= MAX_GROUP:
        raise ValueError(f"group must be in [1, {MAX_GROUP}], got {group}")
    check_multiple("the width of x", H, "group", group)
    if activation not in ("silu", "sigmoid"):
        raise ValueError(f"activation must be silu or sigmoid, got {activation}")
    of_group = w.numel() == group
    check_like(w, "w", [group if of_group else H], x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows, gates = rows_of(x), rows_of(gate)
    block = max(64, triton.next_power_of_2(group))
    _gated_norm_kernel[(rows.shape[0], H // group)](
        *(rows, gates, w.contiguous(), out, H, rows.stride(0), gates.stride(0), float(eps)),
        GROUP=group,
        W_OF_GROUP=of_group,
        GATE_FIRST=gate_first,
        CAST_FIRST=cast_first,
        SIGMOID=activation == "sigmoid",
        BLOCK=block,
        **dependent_launch(x.device),
        num_warps=warps_of(block),
    )
    return out


def warps_of(block: int) -> int:
    """Warps of a program that holds so many numbers: 16 a thread, 32 where those are too many."""
    return min(16, max(1, block // 512))

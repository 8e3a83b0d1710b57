"""Depthwise causal convolution of a few taps, in one launch. Not run on a GPU yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import ACTIVATIONS, activate, pdl_wait

from ..launch import check_floating, check_like, dependent_launch
from .launch import check_dim, token_values

BLOCK = 512  # channels of a program
NUM_WARPS = 4
MAX_TAPS = 32


@triton.jit(do_not_specialize=["Q", "stride_wb"])
def _convolution_kernel(
    window_ptr,  # [B, TAPS - 1 + Q, C]
    weight_ptr,  # [C, TAPS]
    bias_ptr,  # [C] or unused
    out_ptr,  # [B, Q, C]
    Q, C, stride_wb, stride_wt,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (B * Q, cdiv(C, BLOCK)); sums are rounded before the activation, if there is one."""
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    window_ptr += token // Q * stride_wb + token % Q * stride_wt
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS):
        x = tl.load(window_ptr + tap * stride_wt + c, mask=c < C, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + c * TAPS + tap, mask=c < C, other=0.0).to(tl.float32)
        total += w * x
    out = total.to(out_ptr.dtype.element_ty)
    if ACTIVATION >= 0:
        out = activate(out.to(tl.float32), ACTIVATION).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * C + c, out, mask=c < C)


def short_convolution(
    window: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``dense.recurrent.short_convolution`` on a GPU; arguments and result are as there.

    Raises:
        TypeError, ValueError: dtypes, shapes or the activation differ from these.
    """
    check_floating(window, "window")
    check_dim(window, "window", "[B, W - 1 + Q, C]", 3)
    check_dim(weight, "weight", "[C, W]", 2)
    (B, length, C), taps = window.shape, weight.shape[1]
    if not 1 <= taps <= MAX_TAPS:
        raise ValueError(f"taps must be in [1, {MAX_TAPS}], got {taps}")
    check_like(weight, "weight", [C, taps], window.dtype)
    if bias is not None:
        check_like(bias, "bias", [C], window.dtype)
    if length < taps - 1:
        raise ValueError(
            f"window must hold at least the {taps - 1} inputs before the first token, "
            f"got {list(window.shape)}"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    window = token_values(window, "window", window.shape, window.dtype)
    Q = length - taps + 1
    out = torch.empty(B, Q, C, dtype=window.dtype, device=window.device)
    if out.numel() == 0:
        return out
    _convolution_kernel[(B * Q, triton.cdiv(C, BLOCK))](
        *(window, weight.contiguous(), window if bias is None else bias.contiguous(), out, Q, C),
        *window.stride()[:2],
        TAPS=taps,
        HAS_BIAS=bias is not None,
        ACTIVATION=-1 if activation is None else ACTIVATIONS[activation],
        BLOCK=BLOCK,
        **dependent_launch(window.device),
        num_warps=NUM_WARPS,
    )
    return out

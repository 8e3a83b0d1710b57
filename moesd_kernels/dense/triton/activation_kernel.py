"""The gated activation of dense MLPs in one launch. Not run on a GPU yet.

Functions are those of ``experts.triton.common.activate``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import ACTIVATIONS, activate, pdl_wait

from .launch import check_floating, check_like, dependent_launch, rows_of

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _act_kernel(
    gate_ptr,  # [T, I]
    up_ptr,  # [T, I]
    out_ptr,  # [T, I]
    stride_gt,
    stride_ut,
    I,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (T, cdiv(I, BLOCK)); the activation is rounded before the product."""
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < I
    gate = tl.load(gate_ptr + row * stride_gt + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_ut + column, mask=mask, other=0.0).to(tl.float32)
    act = activate(gate, ACTIVATION).to(out_ptr.dtype.element_ty).to(tl.float32)
    out = (act * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * I + column, out, mask=mask)


def act_and_mul(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, computed in fp32, as transformers' dense MLPs round it.

    Args:
        gate: ``[..., I]`` in float32, bfloat16 or float16; strided halves of one ``[..., 2 * I]``
            are read in place.
        up: as gate.
        activation: a key of ``experts.spec.activations.FUNCTIONS``; its value is rounded to
            gate.dtype before the product.

    Returns:
        gate's shape, contiguous.

    Raises:
        TypeError, ValueError: dtypes, shapes or the name differ from these.
    """
    check_floating(gate, "gate")
    check_like(up, "up", gate.shape, gate.dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    gates, ups = rows_of(gate), rows_of(up)
    T, I = gates.shape
    _act_kernel[(T, triton.cdiv(I, BLOCK))](
        gates,
        ups,
        out,
        gates.stride(0),
        ups.stride(0),
        I,
        ACTIVATION=ACTIVATIONS[activation],
        BLOCK=BLOCK,
        **dependent_launch(gate.device),
        num_warps=NUM_WARPS,
    )
    return out

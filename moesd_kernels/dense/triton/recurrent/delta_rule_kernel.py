"""The gated delta rule in one launch. Not run on a GPU yet."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesd_kernels.experts.triton.common import pdl_wait

from ..launch import check_floating, dependent_launch
from .launch import (
    NUM_WARPS,
    check_dim,
    check_multiple,
    check_states,
    floats,
    ragged,
    ragged_row,
    token_values,
)

# Numbers of state that a program holds: 32 a thread.
STATE_TILE = 4096


@triton.jit
def _unit(x_ptr, k, DK: tl.constexpr):
    """A head divided by its norm, in fp32."""
    x = tl.load(x_ptr + k, mask=k < DK, other=0.0).to(tl.float32)
    return x * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 0) + 1e-6))


@triton.jit(do_not_specialize=["num_states", "Q", "stride_qb", "stride_kb", "stride_vb"])
def _delta_rule_kernel(
    query_ptr,  # [B, Q, HV // GROUP, DK], likewise key
    key_ptr,
    value_ptr,  # [B, Q, HV, DV]
    decay_ptr,  # [B, Q, HV] or [B, Q, HV, DK]
    beta_ptr,  # [B, Q, HV]
    states_ptr,  # [num_states, HV, DK, DV]
    rows_ptr,  # [B], likewise keep and counts
    keep_ptr,
    counts_ptr,
    out_ptr,  # [B, Q, HV, DV]
    num_states, Q, scale,
    stride_qb, stride_qt, stride_kb, stride_kt, stride_vb, stride_vt,
    HV: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DK_PAD: tl.constexpr, BLOCK_V: tl.constexpr, PER_CHANNEL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (B * HV, cdiv(DV, BLOCK_V)); a program holds BLOCK_V columns of one head's state."""
    pdl_wait(PDL)
    b, h = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    row, keep, count = ragged_row(rows_ptr, keep_ptr, counts_ptr, b, num_states, Q)
    k = tl.arange(0, DK_PAD)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (k < tl.where(count > 0, DK, 0))[:, None] & (v < DV)[None, :]
    home = states_ptr + (row * HV + h) * DK * DV + k[:, None] * DV + v[None, :]
    state = tl.load(home, mask=inside, other=0.0)
    query_ptr += b * stride_qb + h // GROUP * DK
    key_ptr += b * stride_kb + h // GROUP * DK
    value_ptr += b * stride_vb + h * DV
    for t in range(0, count):
        at = (b * Q + t) * HV + h
        if PER_CHANNEL:
            decay = tl.load(decay_ptr + at * DK + k, mask=k < DK, other=0.0)
            state *= tl.exp(decay)[:, None]
        else:
            state *= tl.exp(tl.load(decay_ptr + at))
        key = _unit(key_ptr + t * stride_kt, k, DK)
        value = tl.load(value_ptr + t * stride_vt + v, mask=v < DV, other=0.0).to(tl.float32)
        recalled = tl.sum(state * key[:, None], 0)
        delta = (value - recalled) * tl.load(beta_ptr + at)
        state += key[:, None] * delta[None, :]
        query = _unit(query_ptr + t * stride_qt, k, DK) * scale
        out = tl.sum(state * query[:, None], 0)
        tl.store(out_ptr + at * DV + v, out.to(out_ptr.dtype.element_ty), mask=v < DV)
        if t + 1 == keep:
            tl.store(home, state, mask=inside)
    nothing = tl.zeros([BLOCK_V], out_ptr.dtype.element_ty)
    for t in range(count, Q):
        tl.store(out_ptr + ((b * Q + t) * HV + h) * DV + v, nothing, mask=v < DV)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    states: Tensor,
    rows: Tensor,
    keep: Tensor,
    counts: Tensor,
) -> Tensor:
    """``dense.recurrent.gated_delta_rule`` on a GPU.

    Arguments and result are as there. Rows, keep and counts are believed, as reading them would
    wait for the device: rows outside the states and negative counts have no tokens, counts end at
    Q, and what two sequences write to one row is undefined.

    Raises:
        TypeError, ValueError: dtypes or shapes differ from these.
    """
    check_floating(value, "value")
    check_dim(query, "query", "[B, Q, Hk, Dk]", 4)
    check_dim(value, "value", "[B, Q, Hv, Dv]", 4)
    (B, Q, HV, DV), (HK, DK) = value.shape, query.shape[2:]
    check_multiple("value heads", HV, "key heads", HK)
    check_states(states, [HV, DK, DV])
    query = token_values(query, "query", [B, Q, HK, DK], value.dtype)
    key = token_values(key, "key", [B, Q, HK, DK], value.dtype)
    value = token_values(value, "value", [B, Q, HV, DV], value.dtype)
    per_channel = decay.dim() == 4
    decay = floats(decay, "decay", [B, Q, HV, DK] if per_channel else [B, Q, HV])
    beta = floats(beta, "beta", [B, Q, HV])
    places = ragged(rows, keep, counts, B)
    out = torch.empty(B, Q, HV, DV, dtype=value.dtype, device=value.device)
    if out.numel() == 0:
        return out
    dk_pad = max(16, triton.next_power_of_2(DK))
    block_v = min(max(8, STATE_TILE // dk_pad), triton.next_power_of_2(DV))
    _delta_rule_kernel[(B * HV, triton.cdiv(DV, block_v))](
        *(query, key, value, decay, beta, states, *places, out),
        *(states.shape[0], Q, DK**-0.5),
        *(stride for x in (query, key, value) for stride in x.stride()[:2]),
        HV=HV,
        GROUP=HV // HK,
        DK=DK,
        DV=DV,
        DK_PAD=dk_pad,
        BLOCK_V=block_v,
        PER_CHANNEL=per_channel,
        **dependent_launch(value.device),
        num_warps=NUM_WARPS,
    )
    return out

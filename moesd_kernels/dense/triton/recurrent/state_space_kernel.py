"""The steps of Mamba's and Mamba-2's state spaces, each in one launch. Not run on a GPU yet."""

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

# Numbers of state that a program holds: 16 a thread, beside which the decays of as many fit.
STATE_TILE = 2048


@triton.jit(do_not_specialize=["num_states", "Q", "stride_xb", "stride_bb", "stride_cb"])
def _state_space_kernel(
    x_ptr,  # [B, Q, H, P]
    dt_ptr,  # [B, Q, H]; per channel [B, Q, P]
    a_ptr,  # [H]; per channel [P, N]
    b_ptr,  # [B, Q, H // GROUP, N], likewise c
    c_ptr,
    d_ptr,  # [H]; per channel [P]
    states_ptr,  # [num_states, H, P, N]
    rows_ptr,  # [B], likewise keep and counts
    keep_ptr,
    counts_ptr,
    out_ptr,  # [B, Q, H, P]
    num_states, Q,
    stride_xb, stride_xt, stride_bb, stride_bt, stride_cb, stride_ct,
    H: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    N_PAD: tl.constexpr, BLOCK_P: tl.constexpr, PER_CHANNEL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (B * H, cdiv(P, BLOCK_P)); a program holds BLOCK_P channels of one head's state.

    PER_CHANNEL: each channel has a dt, a row of A and a D of its own (Mamba-1, where H is 1).
    """
    pdl_wait(PDL)
    sequence, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    row, keep, count = ragged_row(rows_ptr, keep_ptr, counts_ptr, sequence, num_states, Q)
    n = tl.arange(0, N_PAD)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (p < tl.where(count > 0, P, 0))[:, None] & (n < N)[None, :]
    home = states_ptr + ((row * H + h) * P + p[:, None]) * N + n[None, :]
    state = tl.load(home, mask=inside, other=0.0)
    if PER_CHANNEL:
        a = tl.load(a_ptr + p[:, None] * N + n[None, :], mask=inside, other=0.0)
        d = tl.load(d_ptr + p, mask=p < P, other=0.0)
    else:
        a = tl.load(a_ptr + h)
        d = tl.load(d_ptr + h)
    x_ptr += sequence * stride_xb + h * P
    b_ptr += sequence * stride_bb + h // GROUP * N
    c_ptr += sequence * stride_cb + h // GROUP * N
    for t in range(0, count):
        token = sequence * Q + t
        x = tl.load(x_ptr + t * stride_xt + p, mask=p < P, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + t * stride_bt + n, mask=n < N, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + t * stride_ct + n, mask=n < N, other=0.0).to(tl.float32)
        if PER_CHANNEL:
            dt = tl.load(dt_ptr + token * P + p, mask=p < P, other=0.0)
            state *= tl.exp(dt[:, None] * a)
        else:
            dt = tl.load(dt_ptr + token * H + h)
            state *= tl.exp(dt * a)
        state += (dt * x)[:, None] * b[None, :]
        out = tl.sum(state * c[None, :], 1) + d * x
        at = (token * H + h) * P + p
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=p < P)
        if t + 1 == keep:
            tl.store(home, state, mask=inside)
    nothing = tl.zeros([BLOCK_P], out_ptr.dtype.element_ty)
    for t in range(count, Q):
        tl.store(out_ptr + ((sequence * Q + t) * H + h) * P + p, nothing, mask=p < P)


def selective_state_update(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    states: Tensor,
    rows: Tensor,
    keep: Tensor,
    counts: Tensor,
) -> Tensor:
    """``dense.recurrent.selective_state_update`` on a GPU.

    Arguments and result are as there; rows, keep and counts are believed as in
    ``gated_delta_rule``.

    Raises:
        TypeError, ValueError: dtypes or shapes differ from these.
    """
    check_dim(x, "x", "[B, Q, Hh, P]", 4)
    check_dim(B, "B", "[B, Q, G, N]", 4)
    (batch, Q, H, _), G = x.shape, B.shape[2]
    check_multiple("heads", H, "groups", G)
    weights = floats(A, "A", [H]), floats(D, "D", [H])
    dt = floats(dt, "dt", [batch, Q, H])
    return _launch(x, dt, B, C, weights, states, ragged(rows, keep, counts, batch), False)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    states: Tensor,
    rows: Tensor,
    keep: Tensor,
    counts: Tensor,
) -> Tensor:
    """``dense.recurrent.selective_scan`` on a GPU.

    Arguments and result are as there; rows, keep and counts are believed as in
    ``gated_delta_rule``.

    Raises:
        TypeError, ValueError: dtypes or shapes differ from these.
    """
    check_dim(x, "x", "[B, Q, channels]", 3)
    check_dim(B, "B", "[B, Q, N]", 3)
    (batch, Q, channels), N = x.shape, B.shape[2]
    check_states(states, [channels, N])
    weights = floats(A, "A", [channels, N]), floats(D, "D", [channels])
    dt = floats(dt, "dt", [batch, Q, channels])
    check_dim(C, "C", "[B, Q, N]", 3)
    x, B, C = (tensor.unsqueeze(2) for tensor in (x, B, C))  # one head of all channels
    places = ragged(rows, keep, counts, batch)
    return _launch(x, dt, B, C, weights, states.unsqueeze(1), places, True)[:, :, 0]


def _launch(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    weights: tuple[Tensor, Tensor],
    states: Tensor,
    places: tuple[Tensor, ...],
    per_channel: bool,
) -> Tensor:
    check_floating(x, "x")
    (batch, Q, H, P), (G, N) = x.shape, B.shape[2:]
    check_states(states, [H, P, N])
    x = token_values(x, "x", [batch, Q, H, P], x.dtype)
    B, C = (token_values(t, name, [batch, Q, G, N], x.dtype) for t, name in ((B, "B"), (C, "C")))
    out = torch.empty(batch, Q, H, P, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    n_pad = max(16, triton.next_power_of_2(N))
    block_p = min(max(8, STATE_TILE // n_pad), triton.next_power_of_2(P))
    _state_space_kernel[(batch * H, triton.cdiv(P, block_p))](
        *(x, dt, weights[0], B, C, weights[1], states, *places, out, states.shape[0], Q),
        *(stride for tensor in (x, B, C) for stride in tensor.stride()[:2]),
        H=H,
        GROUP=H // G,
        P=P,
        N=N,
        N_PAD=n_pad,
        BLOCK_P=block_p,
        PER_CHANNEL=per_channel,
        **dependent_launch(x.device),
        num_warps=NUM_WARPS,
    )
    return out

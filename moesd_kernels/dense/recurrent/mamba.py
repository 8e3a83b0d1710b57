"""The step of Mamba's selective scan in PyTorch: the definition, which the compiled ones equal."""

from __future__ import annotations

import torch
from torch import Tensor

from .ragged import advance


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
    """``S = exp(dt A) S + (dt x) B``; the output is ``S C + D x``: Mamba-1, channel by channel.

    Everything is computed in the dtype of the states and rounded once, to that of x. The gate that
    follows in the models is not part of it.

    Args:
        x: ``[B, Q, channels]``.
        dt: ``[B, Q, channels]``, after bias and softplus.
        A: ``[channels, N]``, negative.
        B: ``[B, Q, N]``, for all channels.
        C: ``[B, Q, N]``.
        D: ``[channels]``, the skip connection.
        states: ``[R, channels, N]`` fp32, written; fp64 makes this the oracle of the tests.
        rows: ``[B]`` int64 row of each sequence's state.
        keep: ``[B]`` int64, how many tokens are accepted, 0..counts[b].
        counts: ``[B]`` int64, how many tokens there are, 0..Q.

    Returns:
        ``[B, Q, channels]`` in the dtype of x, zeros where there is no token.

    Source: Mamba (2312.00752), algorithm 2.
    """
    dtype = states.dtype
    A, D = A.to(dtype), D.to(dtype)

    def step(state: Tensor, b: int, t: int) -> tuple[Tensor, Tensor]:
        width, channels = dt[b, t].to(dtype)[:, None], x[b, t].to(dtype)[:, None]
        to_state, from_state = B[b, t].to(dtype), C[b, t].to(dtype)  # [N]
        state = state * (width * A).exp() + width * channels * to_state
        return state, (state * from_state).sum(-1) + D * channels[:, 0]

    return advance(states, rows, keep, counts, torch.zeros_like(x), step)

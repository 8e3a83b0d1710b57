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

    Arguments and result are those of ``ops.selective_scan``, already checked. Everything is
    computed in the dtype of the states, which may be fp64 here, and rounded once.

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

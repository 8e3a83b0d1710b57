"""The step of Mamba-2's state space in PyTorch: the definition, which the compiled ones equal."""

from __future__ import annotations

import torch
from torch import Tensor

from .ragged import advance


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
    """``S = exp(dt A) S + (dt x) B``; the output is ``S C + D x``.

    Arguments and result are those of ``ops.selective_state_update``, already checked. Everything is
    computed in the dtype of the states, which may be fp64 here, and rounded once.

    Source: Transformers are SSMs (2405.21060), section 6.
    """
    heads, dtype = x.shape[2], states.dtype
    A, D = A.to(dtype)[:, None], D.to(dtype)[:, None]  # [Hh, 1]

    def step(state: Tensor, b: int, t: int) -> tuple[Tensor, Tensor]:
        width, channels = dt[b, t, :, None].to(dtype), x[b, t].to(dtype)
        to_state, from_state = (
            group[b, t].to(dtype).repeat_interleave(heads // group.shape[2], 0)[:, None]
            for group in (B, C)
        )  # [Hh, 1, N]
        state = state * (width * A).exp()[..., None] + (width * channels)[..., None] * to_state
        return state, (state * from_state).sum(-1) + D * channels

    return advance(states, rows, keep, counts, torch.zeros_like(x), step)

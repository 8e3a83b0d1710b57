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

    Everything is computed in the dtype of the states and rounded once, to that of x.

    Args:
        x: ``[B, Q, Hh, P]``.
        dt: ``[B, Q, Hh]``, after bias, softplus and limits.
        A: ``[Hh]``, negative.
        B: ``[B, Q, G, N]``; G divides Hh, and consecutive heads share a group.
        C: ``[B, Q, G, N]``.
        D: ``[Hh]``, the skip connection.
        states: ``[R, Hh, P, N]`` fp32, written; fp64 makes this the oracle of the tests.
        rows: ``[B]`` int64 row of each sequence's state.
        keep: ``[B]`` int64, how many tokens are accepted, 0..counts[b].
        counts: ``[B]`` int64, how many tokens there are, 0..Q.

    Returns:
        ``[B, Q, Hh, P]`` in the dtype of x, zeros where there is no token.

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

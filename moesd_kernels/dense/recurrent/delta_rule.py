"""The gated delta rule in PyTorch: the definition, which the compiled ones must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from .ragged import advance


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
    """``S = exp(decay) S``, then ``S += k (beta (v - k S))``; the output is ``q S / sqrt(Dk)``.

    Queries and keys are first divided by their norms, ``sqrt(|x|^2 + 1e-6)``. Everything is
    computed in the dtype of the states and rounded once, to that of ``value``.

    Args:
        query: ``[B, Q, Hk, Dk]``; Hk divides Hv, and consecutive value heads share a key head.
        key: ``[B, Q, Hk, Dk]``.
        value: ``[B, Q, Hv, Dv]``.
        decay: ``[B, Q, Hv]``, the logarithm of what remains of the state, or one for each of its
            channels, ``[B, Q, Hv, Dk]`` (Kimi Delta Attention).
        beta: ``[B, Q, Hv]``, how far the state moves to the value.
        states: ``[R, Hv, Dk, Dv]`` fp32, written; fp64 makes this the oracle of the tests.
        rows: ``[B]`` int64 row of each sequence's state.
        keep: ``[B]`` int64, how many tokens are accepted, 0..counts[b].
        counts: ``[B]`` int64, how many tokens there are, 0..Q.

    Returns:
        ``[B, Q, Hv, Dv]`` in the dtype of value, zeros where there is no token.

    Source: Gated Delta Networks (2412.06464), eq. 10; Kimi Linear (2510.26692), eq. 1.
    """
    heads, dtype = value.shape[2], states.dtype

    def step(state: Tensor, b: int, t: int) -> tuple[Tensor, Tensor]:
        q, k = (_unit(x[b, t].to(dtype), heads)[:, None] for x in (query, key))  # [Hv, 1, Dk]
        v, rate = value[b, t, :, None].to(dtype), beta[b, t, :, None, None].to(dtype)
        state = state * decay[b, t].to(dtype).exp().view(heads, -1, 1)
        state = state + k.mT * (rate * (v - _product(k, state)))
        return state, _product(q, state)[:, 0] / query.shape[-1] ** 0.5

    return advance(states, rows, keep, counts, torch.zeros_like(value), step)


def _unit(x: Tensor, heads: int) -> Tensor:
    """x ``[Hk, Dk]`` with heads of norm 1, each for as many of ``heads`` as share it."""
    x = x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    return x.repeat_interleave(heads // x.shape[0], 0)


def _product(x: Tensor, state: Tensor) -> Tensor:
    """x ``[Hv, 1, Dk]`` times the state, ``[Hv, 1, Dv]``."""
    return (x.mT * state).sum(-2, keepdim=True)

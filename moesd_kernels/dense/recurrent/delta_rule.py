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

    Queries and keys are first divided by their norms, ``sqrt(|x|^2 + 1e-6)``.

    Arguments and result are those of ``ops.gated_delta_rule``, already checked. Everything is
    computed in the dtype of the states, which may be fp64 here, and rounded once.

    Source: Gated Delta Networks (2412.06464); a decay per channel: Kimi Linear (2510.26692).
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

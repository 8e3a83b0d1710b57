"""Block verification: accepts at least as many drafts as token-by-token rejection, same law."""

from __future__ import annotations

import torch
from torch import Tensor

from decoder.round import Draft

from .accept import drafted_probs


def accept_block(target_probs: Tensor, draft: Draft, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the longest prefix whose own test passes, even where a shorter one's fails.

    With ``r_i = target_probs_i(x_i) / draft_probs_i(x_i)`` and ``w_0 = 1``::

        w_i = min(w_{i-1} r_i, 1)
        m_i = sum_v (w_i target_probs_{i+1}(v) - draft_probs_{i+1}(v))+
        h_i = m_i / (m_i + 1 - w_i) before a row's last draft, w_i at it
        accepted = largest i with uniform_i <= h_i, 0 when there is none

    Args:
        target_probs: ``[B, G + 1, V]``.
        draft: the proposals, ``G >= 1``.
        uniforms: ``[B, G]`` fp64 in (0, 1). They, and the drafted tokens, must come from noise that
            no earlier round used: whether a prefix is kept depends on the tokens after it, so noise
            of positions that were thrown away is no longer fresh.

    Returns:
        Accepted counts ``[B]`` int64 and ``w`` at them ``[B]`` fp64; the next token is drawn from
        ``(w target_probs - draft_probs)+``.

    Source: Sun et al. 2024 (2403.10444), algorithm 2, with a draft length per row.
    """
    target_x, draft_x = drafted_probs(target_probs, draft)
    weights = _prefix_weights(target_x.double(), draft_x)  # [B, G]
    index = torch.arange(1, draft.gamma + 1, device=weights.device)
    last = index == draft.lengths[:, None]
    mass = torch.zeros_like(weights)
    mass[:, :-1] = _residual_mass(target_probs, draft, target_x, weights)
    denominator = mass + (1.0 - weights)
    pass_rate = torch.where(denominator > 0, mass / denominator, 1.0)
    pass_rate = torch.where(last, weights, pass_rate)
    passed = (uniforms <= pass_rate) & (index <= draft.lengths[:, None])
    accepted = (passed * index).amax(dim=1)
    padded = torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1)  # w_0 … w_G
    return accepted, padded.gather(1, accepted[:, None])[:, 0]


def _prefix_weights(target_x: Tensor, draft_x: Tensor | None) -> Tensor:
    if draft_x is None:
        return target_x.cumprod(dim=1)  # ratios of a one-hot draft never exceed 1
    ratios = torch.where(draft_x > 0, target_x / draft_x, 0.0)
    weights = torch.empty_like(ratios)
    running = torch.ones_like(ratios[:, 0])
    for i in range(ratios.shape[1]):
        running = (running * ratios[:, i]).clamp(max=1.0)
        weights[:, i] = running
    return weights


def _residual_mass(target_probs: Tensor, draft: Draft, target_x: Tensor, weights: Tensor) -> Tensor:
    """``m_1 … m_{G-1}`` as ``[B, G - 1]`` fp64."""
    before_last = weights[:, :-1]
    if draft.probs is None:
        return before_last * (1.0 - target_x[:, 1:].double())
    G = draft.gamma
    scaled = target_probs[:, 1:G] * before_last.to(target_probs.dtype)[..., None]
    return (scaled - draft.probs[:, 1:]).clamp_(min=0.0).sum(dim=-1).double()

"""What a verification decided, and the two steps every rejection rule ends with."""

from __future__ import annotations

import torch
from torch import Tensor

from decoder.round import Draft, Verdict


def assemble(accepted: Tensor, next_tokens: Tensor, drafted: Tensor) -> Verdict:
    """Lay out ``accepted`` drafts and the token after them.

    Args:
        accepted: ``[B]`` int64.
        next_tokens: ``[B]`` int64.
        drafted: ``[B, G]`` int64.
    """
    B, G = drafted.shape
    index = torch.arange(G + 1, device=drafted.device)
    padded = torch.cat([drafted, drafted.new_full((B, 1), -1)], dim=1)  # [B, G + 1]
    tokens = torch.where(index < accepted[:, None], padded, -1)
    return Verdict(accepted, tokens.scatter(1, accepted[:, None], next_tokens[:, None]))


def leading(matches: Tensor, lengths: Tensor) -> Tensor:
    """Number of leading true entries per row of ``[B, G]``, at most ``lengths`` ``[B]``."""
    index = torch.arange(matches.shape[1], device=matches.device)
    return (matches & (index < lengths[:, None])).cumprod(dim=1).sum(dim=1)


def residual(
    target_probs: Tensor, draft: Draft, accepted: Tensor, weight: Tensor | None = None
) -> Tensor:
    """``(weight * target_probs - draft_probs)+`` at the first token that was not accepted.

    Where every draft of a row was accepted there is no draft distribution and the target's own is
    returned; also where rounding left the difference without mass (the two were equal).

    Args:
        target_probs: ``[B, G + 1, V]``.
        draft: the proposals; one-hot ones subtract at their token only.
        accepted: ``[B]`` int64.
        weight: ``[B]``, 1 when absent.

    Returns:
        ``[B, V]``, not normalised: an exponential race does not need it.
    """
    rows = torch.arange(accepted.shape[0], device=accepted.device)
    probs = target_probs[rows, accepted]  # [B, V]
    if draft.gamma == 0:
        return probs
    rejected = (accepted < draft.lengths)[:, None]
    at = accepted.clamp(max=draft.gamma - 1)
    if draft.probs is None:
        token = draft.tokens[rows, at][:, None]
        left = probs.scatter(1, token, probs.gather(1, token).masked_fill(rejected, 0.0))
    else:
        scaled = probs if weight is None else probs * weight.to(probs.dtype)[:, None]
        left = torch.where(rejected, (scaled - draft.probs[rows, at]).clamp_(min=0.0), probs)
    return torch.where(left.sum(dim=-1, keepdim=True) > 0, left, probs)

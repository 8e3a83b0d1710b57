"""Greedy verification and standard rejection sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from decoder.round import Draft, Verdict

from .verdict import leading


def verify_greedy(target_argmax: Tensor, draft: Draft) -> Verdict:
    """Keep drafts while they equal the target's argmax; the next token is the argmax after them.

    Args:
        target_argmax: ``[B, G + 1]`` int64.
        draft: proposals; their distributions do not matter.
    """
    accepted = leading(draft.tokens == target_argmax[:, : draft.gamma], draft.lengths)
    index = torch.arange(draft.gamma + 1, device=accepted.device)
    return Verdict(accepted, torch.where(index <= accepted[:, None], target_argmax, -1))


def accept_standard(target_probs: Tensor, draft: Draft, uniforms: Tensor) -> Tensor:
    """Leading drafts with ``uniform * draft_probs(x) < target_probs(x)``.

    Strict and without a division: a token of target probability 0 is never accepted, and one that
    its own draft distribution could not have produced is rejected.

    Args:
        target_probs: ``[B, G + 1, V]``.
        draft: the proposals.
        uniforms: ``[B, G]`` fp64 in (0, 1), independent of everything the draft looked at.

    Returns:
        ``[B]`` int64 accepted counts.

    Source: Leviathan et al. 2023 (2211.17192), algorithm 1; Chen et al. 2023 (2302.01318).
    """
    target_x, draft_x = drafted_probs(target_probs, draft)
    accept = uniforms < target_x if draft_x is None else uniforms * draft_x < target_x
    if draft_x is not None:
        accept &= draft_x > 0
    return leading(accept, draft.lengths)


def drafted_probs(target_probs: Tensor, draft: Draft) -> tuple[Tensor, Tensor | None]:
    """Probability ``[B, G]`` of each drafted token under the target and under its draft.

    The second is ``None`` for one-hot proposals.
    """
    tokens = draft.tokens[..., None]
    target_x = target_probs[:, : draft.gamma].gather(-1, tokens)[..., 0]
    if draft.probs is None:
        return target_x, None
    return target_x, draft.probs.gather(-1, tokens)[..., 0]

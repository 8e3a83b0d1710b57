"""Greedy verification, standard rejection sampling, and any verifier's decision by kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decoder.model import kernels
from decoder.round import Draft, Verdict

from .distribution import Probs
from .rng import Stream
from .rows import RowTable
from .verdict import leading


def verify_greedy(target_argmax: Tensor, draft: Draft) -> Verdict:
    """Keep drafts while they equal the target's argmax; the next token is the argmax after them.

    Args:
        target_argmax: ``[B, G + 1]`` int64.
        draft: proposals; their distributions do not matter.
    """
    ops = kernels.sampling_ops(target_argmax.device, torch.float32)
    if ops is not None:
        return Verdict(*ops.agree(target_argmax, draft.tokens, draft.lengths))
    accepted = leading(draft.tokens == target_argmax[:, : draft.gamma], draft.lengths)
    index = torch.arange(draft.gamma + 1, device=accepted.device)
    return Verdict(accepted, torch.where(index <= accepted[:, None], target_argmax, -1))


def verify_by(
    ops: Any,
    verifier: str,
    target: Probs,
    draft: Draft,
    rows: Tensor,
    positions: Tensor,
    table: RowTable,
) -> Verdict:
    """Any verifier's decision by the kernels ``ops``; arguments as of ``Sampler.verify``."""
    if verifier == "coupled":
        own = ops.race(target.probs, rows, table.seeds, positions, int(Stream.TARGET))
        return verify_greedy(own, draft)
    drafted = draft.tokens, draft.probs, draft.lengths
    noise = rows, table.seeds, table.rounds, positions
    by_block = verifier == "block"
    return Verdict(
        *ops.rejection(target.probs, *drafted, target.undefined, *noise, by_block=by_block)
    )


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

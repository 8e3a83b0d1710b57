"""Coupled verification: draft and target draw with the same noise, a draft is kept when they agree.

Every emitted token is the target's own draw at that position, so the output is the target's
sampled output for the seed, whatever was drafted. Acceptance is a little below rejection sampling's
optimum and far above that of independent draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decoder.model import kernels
from decoder.round import Draft, Verdict

from . import rng
from .accept import verify_greedy
from .argmax import first_argmax

_CHUNK_ELEMENTS = 1 << 25


def race(probs: Tensor, keys: Tensor) -> Tensor:
    """Draw from ``probs`` by an exponential race: ``argmax(probs / Exp(key, v))``.

    Args:
        probs: ``[..., V]``, non-negative with positive mass, not necessarily normalised.
        keys: ``[...]`` int64 from ``rng.key``.

    Returns:
        ``[...]`` int64; a token of probability 0 is never drawn.
    """
    in_one = kernels.race_op(probs.device, probs.dtype)
    if in_one is not None:
        return in_one(probs, keys)
    return first_argmax(probs / rng.exponential_of(keys, probs.shape[-1]))


def verify_coupled(target_probs: Tensor, draft: Draft, keys: Tensor) -> Verdict:
    """Keep drafts while they equal the target's own draws.

    Args:
        target_probs: ``[B, G + 1, V]``.
        draft: tokens drawn with the same keys (anything else is merely accepted less often).
        keys: ``[B, G + 1]`` int64.
    """
    return verify_greedy(_draw_all(target_probs, keys), draft)


def _draw_all(target_probs: Tensor, keys: Tensor) -> Tensor:
    """``race`` over ``[B, Q]``, some positions at a time: its temporaries are several
    ``[B, Q, V]``."""
    B, Q, V = target_probs.shape
    step = max(1, _CHUNK_ELEMENTS // (B * V))
    chunks = [
        race(target_probs[:, start : start + step], keys[:, start : start + step])
        for start in range(0, Q, step)
    ]
    return torch.cat(chunks, dim=1)

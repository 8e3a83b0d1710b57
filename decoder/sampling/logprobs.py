"""Log-probabilities of emitted tokens, from the logits of the verify pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .distribution import Probs


class TokenLogprobs(NamedTuple):
    """Log-probabilities of one round's emitted tokens; NaN where nothing was emitted.

    Attributes:
        raw: ``[B, Q]`` fp32 under the model's unprocessed logits.
        processed: ``[B, Q]`` fp32 under the distribution that decided the token, after penalties,
            temperature and truncation; 0 for greedy rows, whose law is one-hot.
        top_ids: ``[B, Q, n]`` int64, the n most probable tokens under the raw logits.
        top_raw: ``[B, Q, n]`` fp32, theirs.
    """

    raw: Tensor
    processed: Tensor
    top_ids: Tensor
    top_raw: Tensor


def token_logprobs(logits: Tensor, target: Probs, tokens: Tensor, top: int) -> TokenLogprobs:
    """Log-probabilities of ``tokens`` at the positions where the verify pass chose them.

    Args:
        logits: ``[B, Q, V]``, as the model returned them.
        target: their processed distribution.
        tokens: ``[B, Q]`` int64 emitted tokens, -1 where none.
        top: how many alternatives n to report.

    Raises:
        ValueError: ``top`` exceeds the vocabulary.
    """
    if top > logits.shape[-1]:
        raise ValueError(f"logprobs must be <= the vocabulary size {logits.shape[-1]}, got {top}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = tokens.clamp(min=0)[..., None]  # [B, Q, 1]
    total = logits.logsumexp(dim=-1, keepdim=True)
    raw = (logits.gather(-1, chosen) - total)[..., 0]
    if target.probs is None:
        processed = torch.zeros_like(raw)
    else:
        processed = target.probs.gather(-1, chosen)[..., 0].log()
    values, ids = logits.topk(top, dim=-1)
    missing = tokens < 0
    nan = float("nan")
    return TokenLogprobs(
        raw.masked_fill(missing, nan),
        processed.masked_fill(missing, nan),
        ids,
        (values - total).masked_fill(missing[..., None], nan),
    )

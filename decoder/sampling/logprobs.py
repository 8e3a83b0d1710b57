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
        top_ids: ``[B, Q, n]`` int64, the n most probable tokens under the raw logits, of equally
            probable ones the lowest first.
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
    ids = most_probable(logits, top)
    missing = tokens < 0
    nan = float("nan")
    return TokenLogprobs(
        raw.masked_fill(missing, nan),
        processed.masked_fill(missing, nan),
        ids,
        (logits.gather(-1, ids) - total).masked_fill(missing[..., None], nan),
    )


def most_probable(logits: Tensor, count: int) -> Tensor:
    """The ids of the ``count`` largest of ``[..., V]``, of equal ones the lowest first.

    ``topk`` takes any of equal ones, and others for another count: by it alone a row would have
    other ids beside one that asks for more.
    """
    values, ids = logits.topk(count, dim=-1)
    if count == 0:
        return ids
    least = values[..., -1:]
    numbers = torch.arange(logits.shape[-1], dtype=torch.float32, device=logits.device)
    lowest = torch.where(logits == least, -numbers, -torch.inf).topk(count, dim=-1).indices
    above = (values > least).sum(dim=-1, keepdim=True)
    place = torch.arange(count, device=logits.device)
    ids = torch.where(place < above, ids, lowest.gather(-1, (place - above).clamp(min=0)))
    ids = ids.sort(dim=-1).values
    order = logits.gather(-1, ids).argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order)

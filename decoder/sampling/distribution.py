"""From logits to the distribution a token is drawn from: one function for draft and target."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from decoder.model import kernels
from decoder.round import on_host

from .argmax import first_argmax
from .nucleus import bisected_threshold
from .rows import RowTable

_CANDIDATES = 256  # the nucleus of a trained model rarely holds more tokens


class Probs(NamedTuple):
    """What the tokens at ``[B, Q]`` positions are drawn from.

    Attributes:
        probs: ``[B, Q, V]`` fp32 (fp64 for fp64 logits), one-hot in greedy rows; ``None`` where
            every row is greedy.
        argmax: ``[B, Q]`` int64 where every row is greedy, else ``None``.
        undefined: ``[B, Q]`` bool, positions whose logits define no distribution; what is drawn
            there is some token of the vocabulary. ``None`` when nobody has looked.
    """

    probs: Tensor | None
    argmax: Tensor | None
    undefined: Tensor | None = None


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest-index argmax ``[B, Q]`` and which positions have none (NaN, or every token banned).

    bf16 and fp16 convert to fp32 exactly, so no conversion is needed for the comparison.
    """
    argmax = kernels.argmax_op(logits.device, logits.dtype)
    if argmax is not None:
        return argmax(logits)
    best = first_argmax(logits)
    top = logits.gather(-1, best[..., None])[..., 0]
    return best, ~(top > float("-inf"))


def sampled(logits: Tensor, rows: Tensor, table: RowTable, overwrite: bool) -> Probs:
    """What rows are drawn from of which some are not greedy.

    Args:
        logits: ``[B, Q, V]`` floating, already penalised.
        rows: ``[B]`` int64.
        table: the rows' parameters.
        overwrite: whether ``logits`` may be.
    """
    ops = kernels.sampling_ops(logits.device, logits.dtype)
    if ops is not None:
        limits = (table.temperature, table.top_k, table.top_p, table.min_p)
        probs, undefined = ops.probs(logits, rows, table.greedy, *limits)
        return Probs(probs, None, undefined)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(dtype, copy=table.features.scales_logits and not overwrite)
    choice = most_probable(logits) if table.features.any_greedy else None
    probs, undefined = truncated(logits, rows, table)
    if choice is not None:
        greedy = table.greedy[rows]
        probs = one_hot_where(greedy, choice[0], probs)
        undefined = torch.where(greedy[:, None], choice[1], undefined)
    return Probs(probs, None, undefined)


def truncated(logits: Tensor, rows: Tensor, table: RowTable) -> tuple[Tensor, Tensor]:
    """Probabilities after temperature, top-k, top-p and min-p, in transformers' order.

    Every rule is a threshold on values. Tokens that tie with the last one kept are kept (as
    transformers does for top-k), so the result depends neither on a sort's order of ties nor on
    the other rows.

    Args:
        logits: ``[B, Q, V]`` fp32 or fp64, already penalised; overwritten.
        rows: ``[B]`` int64.
        table: the rows' parameters.

    Returns:
        ``[B, Q, V]`` probabilities, and ``[B, Q]`` bool: positions whose logits define none (NaN,
        +inf, or every token banned).
    """
    features = table.features
    if features.temperature:
        logits /= table.temperature[rows].to(logits.dtype)[:, None, None]
    if features.top_k:
        largest = logits.topk(features.top_k, dim=-1).values
        k = table.top_k[rows][:, None, None].expand(-1, logits.shape[1], 1)
        kth = largest.gather(-1, (k - 1).clamp(max=features.top_k - 1))
        kth = kth.masked_fill(k >= table.vocab_size, float("-inf"))
        logits.masked_fill_(logits < kth, float("-inf"))
    probs = logits.softmax(dim=-1)
    undefined = probs[..., 0].isnan()
    if features.top_p or features.min_p:
        threshold = _threshold(probs, rows, table)
        probs.masked_fill_(probs < threshold, 0.0)
        # Rows that asked for no truncation keep their bits whatever their neighbours ask for.
        probs /= probs.sum(dim=-1, keepdim=True).masked_fill_(threshold == 0, 1.0)
    return probs, undefined


def one_hot_where(greedy: Tensor, best: Tensor, probs: Tensor) -> Tensor:
    """``probs`` with rows ``greedy`` ``[B]`` made one-hot at ``best`` ``[B, Q]``; overwrites it."""
    probs.masked_fill_(greedy[:, None, None], 0.0)
    at_best = probs.gather(-1, best[..., None]).masked_fill(greedy[:, None, None], 1.0)
    return probs.scatter_(-1, best[..., None], at_best)


def _threshold(probs: Tensor, rows: Tensor, table: RowTable) -> Tensor:
    """Smallest probability that top-p and min-p keep, ``[B, Q, 1]``."""
    threshold = torch.zeros_like(probs[..., :1])
    if table.features.min_p:
        min_p = table.min_p[rows].to(probs.dtype)[:, None, None]
        threshold = min_p * probs.amax(dim=-1, keepdim=True)
    if table.features.top_p:
        threshold = torch.maximum(threshold, _nucleus_threshold(probs, rows, table))
    return threshold


def _nucleus_threshold(probs: Tensor, rows: Tensor, table: RowTable) -> Tensor:
    """Probability of the last token of the smallest set whose sum reaches top-p."""
    top_p = table.top_p[rows].double()[:, None, None]
    if not on_host(probs.device):
        return bisected_threshold(probs, top_p)
    counts = _candidate_counts(probs, table)
    for count in counts:
        largest = probs.topk(count, dim=-1).values
        before = largest.cumsum(dim=-1, dtype=torch.float64) - largest
        kept = (before < top_p).sum(dim=-1, keepdim=True)
        # A full sort only when some nucleus reaches past the candidates.
        if count == counts[-1] or not bool(((kept == count) & (top_p < 1)).any()):
            break
    threshold = largest.gather(-1, (kept - 1).clamp(min=0))
    return threshold.masked_fill(top_p > 1, 0.0)


def _candidate_counts(probs: Tensor, table: RowTable) -> list[int]:
    """How many of the largest probabilities to sort, tried in turn."""
    V = probs.shape[-1]
    if not table.features.top_p_without_top_k:
        return [table.features.top_k]
    return [V] if V <= 2 * _CANDIDATES else [_CANDIDATES, V]

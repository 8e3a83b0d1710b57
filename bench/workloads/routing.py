"""Synthetic routings: uniform, Zipf, correlated along a sequence, and the two extremes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ROUTINGS = ("uniform", "zipf", "correlated", "same")
ZIPF_EXPONENT = 1.0
DEFAULT_UNION_RATIO = 0.65  # measured models lie at 0.61-0.69 of the uniform union at 8-15 rows


def route(
    kind: str,
    batch: int,
    rows: int,
    num_experts: int,
    top_k: int,
    generator: torch.Generator,
    union_ratio: float = DEFAULT_UNION_RATIO,
) -> Tensor:
    """Expert ids of ``batch`` sequences of ``rows`` consecutive tokens.

    Args:
        kind: ``uniform``: K distinct experts, independent; ``zipf``: popularity 1/rank;
            ``correlated``: a token keeps experts of the token before it, so that the union over a
            sequence's rows is about ``union_ratio`` of the uniform one; ``same``: all tokens alike.
        generator: source of randomness, on the CPU.

    Returns:
        ``[batch * rows, top_k]`` int64, distinct within a row, rows of a sequence adjacent.
    """
    tokens = batch * rows
    if kind == "same":
        return torch.arange(top_k).expand(tokens, top_k).contiguous()
    if kind not in ROUTINGS:
        raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}; got {kind!r}")
    scores = torch.rand(tokens, num_experts, generator=generator).log_().neg_()  # Exp(1)
    if kind == "zipf":
        popularity = torch.arange(1, num_experts + 1).double().pow(-ZIPF_EXPONENT)
        scores = scores / popularity[torch.randperm(num_experts, generator=generator)].float()
    if kind == "correlated":
        keep = _keep_probability(rows, num_experts, top_k, union_ratio)
        return _correlated(scores.view(batch, rows, num_experts), top_k, keep, generator)
    return scores.topk(top_k, dim=1, largest=False).indices


def _correlated(scores: Tensor, top_k: int, keep: float, generator: torch.Generator) -> Tensor:
    """Each token keeps each expert of its predecessor with probability ``keep``."""
    batch, rows, _ = scores.shape
    ids = torch.empty(batch, rows, top_k, dtype=torch.int64)
    ids[:, 0] = scores[:, 0].topk(top_k, dim=1, largest=False).indices
    for row in range(1, rows):
        kept = torch.rand(batch, top_k, generator=generator) < keep
        current = scores[:, row].clone()
        # A kept expert gets a score below every fresh one, a dropped one goes to the end.
        before = ids[:, row - 1]
        current.scatter_(1, before, torch.where(kept, -1.0, 1e9).to(current.dtype))
        ids[:, row] = current.topk(top_k, dim=1, largest=False).indices
    return ids.view(batch * rows, top_k)


@cache
def _keep_probability(rows: int, num_experts: int, top_k: int, union_ratio: float) -> float:
    """Bisect ``keep`` so that ``rows`` tokens use ``union_ratio`` of the uniform union."""
    if rows == 1:
        return 0.0
    uniform = num_experts * (1 - (1 - top_k / num_experts) ** rows)
    wanted = max(union_ratio * uniform, top_k)
    low, high = 0.0, 1.0
    for _ in range(20):
        keep = (low + high) / 2
        probe = torch.Generator().manual_seed(0)
        scores = torch.rand(256, rows, num_experts, generator=probe)
        ids = _correlated(scores, top_k, keep, probe).view(256, -1)
        used = torch.zeros(256, num_experts).scatter_(1, ids, 1.0).sum(1).mean().item()
        low, high = (keep, high) if used > wanted else (low, keep)
    return (low + high) / 2


def distinct_experts(topk_ids: Tensor) -> int:
    """How many experts a call must read."""
    return int(topk_ids.unique().numel())

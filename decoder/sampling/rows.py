"""Sampling parameters of every row, as device vectors, and what the host needs to know of them."""

from __future__ import annotations

from collections.abc import Iterable
from ctypes import c_float
from dataclasses import dataclass

import torch
from torch import Tensor

from decoder.requests.params import SamplingParams
from decoder.round import on_host


@dataclass(frozen=True, slots=True)
class Features:
    """Which processing steps any admitted request needs; the others are skipped for the batch.

    A step that does run leaves the rows that did not ask for it bit-identical, so a row never
    depends on its neighbours.
    """

    any_greedy: bool = False
    any_sampled: bool = False
    temperature: bool = False
    top_k: int = 0  # the largest asked for
    top_p: bool = False
    top_p_without_top_k: bool = False
    min_p: bool = False

    @property
    def scales_logits(self) -> bool:
        """Whether logits themselves are changed before the softmax."""
        return self.temperature or self.top_k > 0


class RowTable:
    """Truncation parameters and seeds by row, on the sampler's device.

    Attributes:
        seeds: ``[max_batch_size]`` int64.
        rounds: ``[max_batch_size]`` int64, verifications of drafts of the row since admission.
        greedy: ``[max_batch_size]`` bool.
        temperature, top_p, min_p: ``[max_batch_size]`` fp32; neutral (1, 2, 0) where not asked for.
        top_k: ``[max_batch_size]`` int64; V where not asked for.
    """

    def __init__(self, max_batch_size: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.seeds = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self.rounds = torch.zeros(max_batch_size, dtype=torch.int64, device=device)
        self.greedy = torch.ones(max_batch_size, dtype=torch.bool, device=device)
        self.temperature = torch.ones(max_batch_size, device=device)
        self.top_k = torch.full((max_batch_size,), vocab_size, dtype=torch.int64, device=device)
        self.top_p = torch.full((max_batch_size,), 2.0, device=device)
        self.min_p = torch.zeros(max_batch_size, device=device)
        self.admitted: dict[int, SamplingParams] = {}
        self._features: Features | None = None

    def admit(self, row: int, params: SamplingParams) -> None:
        sampled = not params.greedy
        self.seeds[row] = params.seed or 0
        self.rounds[row] = 0
        self.greedy[row] = params.greedy
        # Truncation cannot change an argmax: greedy rows keep the neutral values.
        self.temperature[row] = params.temperature if sampled else 1.0
        self.top_k[row] = _top_k(params, self.vocab_size) or self.vocab_size
        self.top_p[row] = _top_p(params)
        self.min_p[row] = params.min_p if sampled else 0.0
        self.admitted[row] = params
        self._features = None

    def release(self, row: int) -> None:
        self.admitted.pop(row, None)
        self._features = None

    def rounds_after(self, rows: Tensor, drafted: Tensor) -> Tensor:
        """``rounds`` after a verification in which ``drafted`` ``[B]`` bool rows had drafts.

        A row whose neighbours alone had drafts does not move: it has used no noise.
        """
        return self.rounds.index_add(0, rows, drafted.to(torch.int64))

    @property
    def features(self) -> Features:
        """What the admitted requests need, worked out once after each change."""
        if self._features is None:
            self._features = self._find_features()
        return self._features

    def all_greedy(self, rows: Iterable[int] | Tensor) -> bool:
        """Whether every row decodes greedily; on an accelerator, where looking at a tensor would
        wait for it, whether every admitted request does."""
        if not self.features.any_sampled:
            return True
        if not self.features.any_greedy:
            return False
        if isinstance(rows, Tensor):
            if not on_host(rows.device):
                return False
            rows = rows.tolist()
        return all(row in self.admitted and self.admitted[row].greedy for row in rows)

    def _find_features(self) -> Features:
        every = self.admitted.values()
        sampled = [p for p in every if not p.greedy]
        return Features(
            any_greedy=len(sampled) < len(self.admitted),
            any_sampled=bool(sampled),
            temperature=any(p.temperature != 1 for p in sampled),
            top_k=max((_top_k(p, self.vocab_size) for p in sampled), default=0),
            top_p=any(_top_p(p) < 1 for p in sampled),
            top_p_without_top_k=any(
                _top_p(p) < 1 and not _top_k(p, self.vocab_size) for p in sampled
            ),
            min_p=any(p.min_p > 0 for p in sampled),
        )


def check_request(
    params: SamplingParams, prompt_ids: Iterable[int], stop_ids: Iterable[int], vocab_size: int
) -> None:
    """Raises a ValueError: an id outside the vocabulary, or more log-probabilities than it has."""
    for name, ids in (
        ("prompt ids", prompt_ids),
        ("logit_bias ids", params.logit_bias or ()),
        ("stop ids", stop_ids),
    ):
        outside = [i for i in ids if not 0 <= i < vocab_size]
        if outside:
            raise ValueError(f"{name} must be in [0, {vocab_size}), got {outside[0]}")
    if (params.logprobs or 0) > vocab_size:
        raise ValueError(f"logprobs must be <= {vocab_size}, got {params.logprobs}")


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    """The number of tokens that top-k keeps, 0 where it keeps all."""
    restricts = not params.greedy and 0 < params.top_k < vocab_size
    return params.top_k if restricts else 0


def _top_p(params: SamplingParams) -> float:
    """The mass that top-p keeps, in fp32; 2 where it keeps all.

    2 rather than 1: rounding can bring a cumulative sum to 1 before the last token.
    """
    rounded = c_float(params.top_p).value
    return rounded if not params.greedy and rounded < 1 else 2.0

"""Processed distributions, counter-based randomness, and lossless acceptance of drafted tokens.

A row's randomness is a pure function of its request's seed and of the position that is sampled;
nothing depends on the other rows of a batch. A token is always drawn from the very tensor that is
kept as its distribution.
"""

from __future__ import annotations

from .distribution import Probs
from .logprobs import TokenLogprobs
from .sampler import VERIFIERS, Sampler

__all__ = ["VERIFIERS", "Probs", "Sampler", "TokenLogprobs"]

"""The sampler's kernels as far as coupled verification needs them, acted by PyTorch.

As the kernels do, they look up in the tables what a row asks for, whatever the other rows do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from decoder.sampling import rng
from decoder.sampling.coupled import race as race_by_keys
from decoder.sampling.distribution import most_probable, one_hot_where, truncated
from decoder.sampling.rows import Features
from decoder.sampling.verdict import leading


def probs(
    logits: Tensor,
    rows: Tensor,
    greedy: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    V = logits.shape[-1]
    table: Any = SimpleNamespace(
        features=Features(True, True, True, V, True, True, True), vocab_size=V,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    best, undefined = most_probable(logits)
    found, unknown = truncated(logits.float(), rows, table)
    found = one_hot_where(greedy[rows], best, found)
    return found, torch.where(greedy[rows][:, None], undefined, unknown)


def race(
    probs: Tensor,
    rows: Tensor,
    seeds: Tensor,
    positions: Tensor,
    stream: int,
    rounds: Tensor | None = None,
) -> Tensor:
    own = seeds[rows] if rounds is None else rng.fold(seeds[rows], rounds[rows])
    return race_by_keys(probs, rng.key(own, positions, rng.Stream(stream)))


def agree(argmax: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    accepted = leading(tokens == argmax[:, : tokens.shape[1]], lengths)
    index = torch.arange(argmax.shape[1])
    return accepted, torch.where(index <= accepted[:, None], argmax, -1)

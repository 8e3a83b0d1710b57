"""The cut that accelerators search for is the one that a sort finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decoder.requests.params import SamplingParams
from decoder.sampling import Sampler
from decoder.sampling.nucleus import bisected_threshold

V = 600


def sorted_threshold(probs: Tensor, top_p: Tensor) -> Tensor:
    """The definition, as a CPU computes it."""
    largest = probs.sort(dim=-1, descending=True).values
    before = largest.cumsum(dim=-1, dtype=torch.float64) - largest
    kept = (before < top_p).sum(dim=-1, keepdim=True)
    return largest.gather(-1, kept - 1).masked_fill(top_p > 1, 0.0)


def rows_of(kind: str, dtype: torch.dtype) -> Tensor:
    logits = torch.randn(40, V, dtype=dtype)
    if kind == "peaked":
        logits *= torch.linspace(2, 30, 40)[:, None]
    elif kind == "tied":
        logits = logits.mul(2).round().div(2)
    elif kind == "cut by top-k":
        kth = logits.topk(50).values[:, -1:]
        logits[logits < kth] = -torch.inf
    elif kind == "uniform":
        logits[:] = 0.0
        logits[:, 8:] = -torch.inf
    elif kind == "one-hot":
        logits[:, 1:] = -torch.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "cut by top-k", "uniform", "one-hot"])
def test_a_search_finds_what_a_sort_does(kind, dtype):
    probs = rows_of(kind, dtype)
    for top_p in (1e-9, 0.1, 0.375, 0.5, 0.9, 0.95, 0.999, 2.0):
        # As the sampler keeps it: in fp32.
        limit = torch.full((40, 1), top_p).double()
        assert torch.equal(bisected_threshold(probs, limit), sorted_threshold(probs, limit))


def test_a_cut_depends_on_its_row_alone():
    probs = rows_of("flat", torch.float32)
    limits = torch.linspace(0.05, 1.05, 40, dtype=torch.float64)[:, None]
    together = bisected_threshold(probs, limits)
    order = torch.randperm(V)
    assert torch.equal(bisected_threshold(probs[:, order], limits), together)
    for row in (0, 17, 39):
        alone = bisected_threshold(probs[row : row + 1], limits[row : row + 1])
        assert torch.equal(alone, together[row : row + 1])


def test_an_undefined_row_ends_its_search_and_leaves_the_others_alone():
    probs = rows_of("flat", torch.float32)
    limit = torch.full((40, 1), 0.9, dtype=torch.float64)
    wanted = bisected_threshold(probs, limit)
    probs[0] = torch.nan
    assert torch.equal(bisected_threshold(probs, limit)[1:], wanted[1:])


def test_an_accelerator_sorts_no_vocabulary(monkeypatch):
    """Also beside rows with top-k: a row's cut must not depend on what others ask for."""
    meta = torch.device("meta")
    sampler = Sampler(2, V, meta)
    sampler.admit(0, SamplingParams(temperature=1.0, top_p=0.9), [3], set())
    sampler.admit(1, SamplingParams(temperature=1.0, top_k=20, top_p=0.8), [3], set())
    asked = []
    topk = torch.Tensor.topk

    def spy(self: Tensor, k: int, **options: int) -> tuple[Tensor, Tensor]:
        asked.append(k)
        return topk(self, k, **options)

    monkeypatch.setattr(torch.Tensor, "topk", spy)
    rows = torch.zeros(2, dtype=torch.int64, device=meta)
    positions = torch.zeros(2, 3, dtype=torch.int64, device=meta)
    probs = sampler.distribution(torch.zeros(2, 3, V, device=meta), rows, positions).probs
    assert probs is not None and probs.shape == (2, 3, V)
    assert asked == [20], "top-k alone looks at the largest"


@pytest.mark.parametrize("top_p", [0.99999999, 1 - 2**-40])
def test_what_rounds_to_one_keeps_all(top_p):
    """Whatever the neighbours need."""
    logits = torch.randn(2, 1, 2048)
    near_one = SamplingParams(temperature=1.0, top_p=top_p, seed=1)
    for other in (near_one, SamplingParams(temperature=1.0, top_p=0.999, seed=1)):
        sampler = Sampler(2, 2048, torch.device("cpu"))
        sampler.admit(0, near_one, [3], set())
        sampler.admit(1, other, [3], set())
        positions = torch.ones(2, 1, dtype=torch.int64)
        probs = sampler.distribution(logits, torch.arange(2), positions).probs
        assert probs is not None and (probs[0] > 0).all()

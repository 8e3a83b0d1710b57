"""The kernel's cuts are the reference's, bit for bit: both sum exactly, in whatever order."""

import pytest
import torch

from decoder.sampling.nucleus import bisected_threshold
from moesd_kernels.dense import nucleus_kernel
from moesd_kernels.dense.nucleus_kernel import nucleus_threshold

TOP_P = (1e-6, 0.3, 0.9, 0.99, 1 - 2**-24, 2.0)


def rows_of(V, kind):
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(len(TOP_P), V, generator=generator)
    if kind == "peaked":
        logits *= 30.0  # probabilities down to 2**-149, where rounding matters
    elif kind == "tied":
        logits = logits.round()
    elif kind == "cut":
        logits[logits < logits.median(dim=-1, keepdim=True).values] = -torch.inf
    elif kind == "one":
        logits[:, 1:] = -torch.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "cut", "one"])
@pytest.mark.parametrize(("V", "block"), [(1, 16), (31, 16), (1000, 128), (130, 4096)])
def test_equals_the_reference(monkeypatch, V, block, kind):
    monkeypatch.setattr(nucleus_kernel, "BLOCK", block)
    probs = rows_of(V, kind).view(2, 3, V)
    top_p = torch.tensor(TOP_P, dtype=torch.float64).view(2, 3, 1)
    got = nucleus_threshold(probs, top_p)
    assert got.shape == (2, 3, 1)
    assert torch.equal(got, bisected_threshold(probs, top_p))
    shared = torch.full((2, 1, 1), 0.9, dtype=torch.float64)  # one for all positions of a row
    assert torch.equal(nucleus_threshold(probs, shared), bisected_threshold(probs, shared))


def test_undefined_rows_end_and_leave_the_others_alone():
    probs = rows_of(40, "flat")
    top_p = torch.full((len(probs), 1), 0.9, dtype=torch.float64)
    wanted = nucleus_threshold(probs, top_p)
    probs[0], probs[1, 7] = torch.nan, -torch.nan
    got = nucleus_threshold(probs, top_p)
    assert torch.equal(got[2:], wanted[2:])
    assert nucleus_threshold(probs[:0], top_p[:0]).shape == (0, 1)

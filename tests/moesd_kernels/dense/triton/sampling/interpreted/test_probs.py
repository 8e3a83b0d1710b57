"""Distributions: what PyTorch's form keeps is kept, whatever the block and the other rows."""

import pytest
import torch
from support.oracle import assert_as_accurate

from decoder.requests.params import SamplingParams
from decoder.sampling.distribution import sampled
from decoder.sampling.nucleus import bisected_threshold
from decoder.sampling.rows import RowTable
from moesd_kernels.dense.triton.sampling import probs_kernel
from moesd_kernels.dense.triton.sampling.probs_kernel import probs

V = 77
RULES = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
)
ROWS = torch.tensor([5, 0, 3, 1, 7, 2, 4, 6])  # a row's place in its tables is not in the batch
INFINITE, NAN = float("inf"), float("nan")
KINDS = ("random", "tied", "flat", "one", "few", "far", "nan", "infinite", "banned")


def table_of(vocab_size):
    table = RowTable(len(RULES), vocab_size, torch.device("cpu"))
    for row, rules in enumerate(RULES):
        table.admit(row, SamplingParams(**rules))
    return table


def run(logits, table, rows=ROWS):
    limits = (table.temperature, table.top_k, table.top_p, table.min_p)
    return probs(logits, rows, table.greedy, *limits)


def logits_of(*kinds):
    logits = 3 * torch.randn(len(RULES), len(kinds), V)
    for position, kind in enumerate(kinds):
        x = logits[:, position]
        if kind == "tied":
            x.round_()
        elif kind == "flat":
            x.zero_()
        elif kind == "one":
            x[:, :-1] = -INFINITE
        elif kind == "few":
            x[:, 3:] = -INFINITE
        elif kind == "far":
            x.mul_(30).sub_(500)  # probabilities down to 2**-149 and below
        elif kind == "nan":
            x[:, 40] = NAN
        elif kind == "infinite":
            x[:, [9, 40]] = INFINITE
        elif kind == "banned":
            x[:] = -INFINITE
    return logits


def reference(logits, table):
    return sampled(logits, ROWS, table, overwrite=False)


def test_keeps_what_pytorch_keeps():
    table, logits = table_of(V), logits_of(*KINDS)
    actual, undefined = run(logits, table)
    expected = reference(logits, table)
    assert torch.equal(undefined, expected.undefined)
    assert torch.equal(actual.isnan(), expected.probs.isnan())
    assert torch.equal(actual > 0, expected.probs > 0)
    exact = reference(logits.double(), table).probs
    flat = [x[~undefined] for x in (actual, expected.probs, exact)]
    assert_as_accurate(*flat, groups=torch.arange(len(flat[0])))
    greedy = int((ROWS == 0).nonzero())
    assert actual[greedy].sum(-1).eq(1).all() and actual[greedy].amax(-1).eq(1).all()


def test_cuts_are_those_of_its_own_probabilities():
    """To the bit, at any limit: here nothing rests on another exponential's last one."""
    logits = logits_of("tied")
    whole, limited = table_of(V), table_of(V)
    for row in range(len(RULES)):
        whole.admit(row, SamplingParams(temperature=0.8))
        limited.admit(row, SamplingParams(temperature=0.8, top_p=0.11 * (row + 1)))
    everything, _ = run(logits, whole)
    kept, _ = run(logits, limited)
    limits = limited.top_p[ROWS].double()[:, None, None]
    assert torch.equal(kept > 0, everything >= bisected_threshold(everything, limits))
    total = torch.where(kept > 0, everything, 0.0).double().sum(-1, keepdim=True).float()
    assert torch.equal(kept, torch.where(kept > 0, everything / total, 0.0))


def test_neither_the_block_nor_other_rows_matter(monkeypatch):
    table, logits = table_of(V), logits_of("tied")
    expected, _ = run(logits, table)
    monkeypatch.setattr(probs_kernel, "BLOCK", 32)
    assert torch.equal(run(logits[3:6], table, ROWS[3:6])[0], expected[3:6])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_and_strides(dtype):
    table, logits = table_of(V), logits_of("random", "tied").to(dtype)[3:5]
    expected, _ = run(logits.float(), table, ROWS[3:5])
    padded = torch.cat([logits, logits], dim=-1)
    assert torch.equal(run(padded[..., :V], table, ROWS[3:5])[0], expected)


def test_nothing_and_errors():
    table, logits = table_of(V), logits_of("random")
    actual, undefined = run(logits[:0], table, ROWS[:0])
    assert actual.shape == (0, 1, V) and undefined.shape == (0, 1)
    with pytest.raises(ValueError, match=r"with V > 0, got \[8, 77\]"):
        run(logits[:, 0], table)
    with pytest.raises(ValueError, match=r"rows must be \[8\], got \[2\]"):
        run(logits, table, ROWS[:2])
    with pytest.raises(TypeError, match=r"logits must be .* got torch\.float64"):
        run(logits.double(), table)

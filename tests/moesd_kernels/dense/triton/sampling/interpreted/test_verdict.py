"""Verification: accepted counts and emitted tokens are the PyTorch sampler's."""

import pytest
import torch
from scipy.stats import chi2

from decoder.requests.params import SamplingParams
from decoder.round import Draft
from decoder.sampling import Probs, Sampler
from decoder.sampling.accept import verify_greedy
from moesd_kernels.dense.triton.sampling import accept_kernel, residual_kernel
from moesd_kernels.dense.triton.sampling.residual_kernel import rejection
from moesd_kernels.dense.triton.sampling.verdict_kernel import agree

RULES = pytest.mark.parametrize("rule", ["standard", "block"])
B, V = 8, 37


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(accept_kernel, "BLOCK", 16)
    monkeypatch.setattr(residual_kernel, "BLOCK", 16)


def sampler_of(rule, rows=B, vocab_size=V):
    sampler = Sampler(rows, vocab_size, "cpu", rule)
    for row in range(rows):
        sampler.admit(row, SamplingParams(temperature=1.0, seed=row), [0], set())
    sampler._table.rounds[:rows] = torch.randint(0, 9, (rows,))
    return sampler


def drafted(G, one_hot, near=0.5):
    """Target probabilities and a draft that is like them, ragged lengths."""
    logits = 2 * torch.randn(B, G + 1, V)
    target = logits.softmax(-1)
    probs = (logits[:, :G] + near * torch.randn(B, G, V)).softmax(-1)
    probs[0] = target[0, :G]  # nothing is left of it
    target[1, 0, 5:], probs[1, :1, :30] = 0.0, 0.0  # nothing in common
    target /= target.sum(-1, keepdim=True)
    probs /= probs.sum(-1, keepdim=True)
    tokens = torch.multinomial(probs.view(-1, V), 1).view(B, G) if G else torch.zeros(B, 0).long()
    lengths = torch.randint(0, G + 1, (B,))
    lengths[:4] = G
    return target, Draft(tokens, None if one_hot else probs, lengths)


def run(sampler, target, undefined, draft, rows, positions):
    table = sampler._table
    noise = (rows, table.seeds, table.rounds, positions)
    given = (draft.tokens, draft.probs, draft.lengths, undefined, *noise)
    return rejection(target, *given, by_block=sampler.verifier == "block")


@RULES
@pytest.mark.parametrize("one_hot", [False, True], ids=["dense", "one-hot"])
@pytest.mark.parametrize("G", [1, 3])
def test_equals_the_sampler(rule, one_hot, G):
    sampler, rows = sampler_of(rule), torch.randperm(B)
    target, draft = drafted(G, one_hot)
    positions = torch.randint(0, 99, (B, 1)) + torch.arange(G + 1)
    undefined = torch.zeros(B, G + 1, dtype=torch.bool)
    undefined[4, 1] = undefined[5] = True
    target[undefined] = float("nan")
    expected = sampler.verify(Probs(target, None, undefined), draft, rows, positions)
    accepted, tokens = run(sampler, target, undefined, draft, rows, positions)
    assert torch.equal(accepted, expected.accepted) and torch.equal(tokens, expected.tokens)
    if not one_hot:
        assert accepted[0] == G and accepted[1] == 0, "an equal and a disjoint draft"


@RULES
def test_without_drafts_and_without_rows(rule):
    sampler, rows = sampler_of(rule), torch.arange(B)
    target, draft = drafted(0, False)
    positions = torch.arange(B)[:, None]
    expected = sampler.verify(Probs(target, None, None), draft, rows, positions)
    accepted, tokens = run(sampler, target, None, draft, rows, positions)
    assert accepted.eq(0).all() and torch.equal(tokens, expected.tokens)
    none = Draft(draft.tokens[:0], None, draft.lengths[:0])
    accepted, tokens = run(sampler, target[:0], None, none, rows[:0], positions[:0])
    assert accepted.shape == (0,) and tokens.shape == (0, 1)


@RULES
def test_emitted_tokens_have_the_target_s_law(rule):
    N = 60
    sampler, rows = sampler_of(rule, N, 3), torch.arange(N)
    law = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    target = law.expand(N, 3, 3)
    probs = torch.tensor([[0.1, 0.3, 0.6], [0.3, 0.4, 0.3]]).expand(N, 2, 3)
    tokens = torch.stack([torch.multinomial(probs[:, i], 1)[:, 0] for i in range(2)], dim=1)
    draft = Draft(tokens, probs, torch.full((N,), 2))
    positions = torch.arange(3).expand(N, 3)
    accepted, emitted = run(sampler, target, None, draft, rows, positions)
    assert 0 < accepted.double().mean() < 2
    first, second = emitted[:, 0], emitted[accepted > 0, 1]
    for seen, wanted in ((first, law[0]), (second, law[1])):
        wanted = len(seen) * wanted
        counts = torch.bincount(seen, minlength=3)
        assert chi2.sf(float(((counts - wanted) ** 2 / wanted).sum()), 2) > 1e-6


def test_agreement_is_greedy_verification():
    own = torch.randint(0, 2, (B, 4))
    for G in (0, 3):
        draft = Draft(torch.randint(0, 2, (B, G)), None, torch.randint(0, G + 1, (B,)))
        expected = verify_greedy(own[:, : G + 1], draft)
        accepted, tokens = agree(own[:, : G + 1], draft.tokens, draft.lengths)
        assert torch.equal(accepted, expected.accepted) and torch.equal(tokens, expected.tokens)
    assert agree(own[:0], draft.tokens[:0], draft.lengths[:0])[1].shape == (0, 4)


def test_errors():
    sampler, rows = sampler_of("standard"), torch.arange(B)
    target, draft = drafted(2, False)
    positions = torch.zeros(B, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target_probs must be \[8, 3, 37\], got \[8, 2, 37\]"):
        run(sampler, target[:, :2], None, draft, rows, positions)
    with pytest.raises(TypeError, match=r"draft_probs must be torch\.float32"):
        run(sampler, target, None, Draft(draft.tokens, draft.probs.double(), draft.lengths), rows,
            positions)  # fmt: skip
    with pytest.raises(ValueError, match=r"undefined must be \[8, 3\], got \[8, 2\]"):
        run(sampler, target, torch.zeros(B, 2, dtype=torch.bool), draft, rows, positions)
    with pytest.raises(ValueError, match=r"own must be \[8, 3\], got \[8, 2\]"):
        agree(draft.tokens, draft.tokens, draft.lengths)

"""Verification: layouts, mixed batches, lengths per row, one-hot drafts, log-probabilities."""

from __future__ import annotations

import pytest
import torch

from decoder.requests.params import SamplingParams
from decoder.round import Draft
from decoder.sampling import VERIFIERS, Probs, Sampler

V, B, G = 12, 64, 3


def sampler_with(verifier: str, greedy: slice = slice(0, 0), rows: int = B) -> Sampler:
    sampler = Sampler(rows, V, "cpu", verifier)
    greedy_rows = set(range(rows)[greedy])
    for row in range(rows):
        temperature = 0.0 if row in greedy_rows else 1.0
        sampler.admit(row, SamplingParams(temperature=temperature, seed=row), [0], set())
    return sampler


def random_probs(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul(2).softmax(-1)


def random_draft(seed: int, one_hot: bool = False) -> Draft:
    generator = torch.Generator().manual_seed(seed)
    probs = random_probs(seed, B, G, V)
    tokens = torch.multinomial(probs.view(-1, V), 1, generator=generator).view(B, G)
    lengths = torch.randint(0, G + 1, (B,), generator=generator)
    return Draft(tokens, None if one_hot else probs, lengths)


SLOTS = torch.arange(B)
POSITIONS = 1 + torch.arange(G + 1).expand(B, G + 1)


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("one_hot", [False, True])
def test_layout_of_a_verdict(verifier, one_hot):
    draft = random_draft(1, one_hot)
    verdict = sampler_with(verifier).verify(
        Probs(random_probs(2, B, G + 1, V), None), draft, SLOTS, POSITIONS
    )
    assert verdict.accepted.dtype == verdict.tokens.dtype == torch.int64
    assert bool((verdict.accepted <= draft.lengths).all())
    for b in range(B):
        k = int(verdict.accepted[b])
        row = verdict.tokens[b].tolist()
        assert row[:k] == draft.tokens[b, :k].tolist()
        assert 0 <= row[k] < V
        assert row[k + 1 :] == [-1] * (G - k)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_tokens_after_a_rows_draft_length_do_not_matter(verifier):
    draft = random_draft(1)
    target = Probs(random_probs(2, B, G + 1, V), None)
    beyond = torch.arange(G) >= draft.lengths[:, None]
    other = Draft(
        torch.where(beyond, 0, draft.tokens),
        torch.where(beyond[..., None], random_probs(9, B, G, V), draft.probs),
        draft.lengths,
    )
    a = sampler_with(verifier).verify(target, draft, SLOTS, POSITIONS)
    b = sampler_with(verifier).verify(target, other, SLOTS, POSITIONS)
    assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_one_hot_drafts_need_no_dense_distribution(verifier):
    draft = random_draft(1, one_hot=True)
    dense = torch.nn.functional.one_hot(draft.tokens, V).float()
    target = Probs(random_probs(2, B, G + 1, V), None)
    a = sampler_with(verifier).verify(target, draft, SLOTS, POSITIONS)
    b = sampler_with(verifier).verify(
        target, Draft(draft.tokens, dense, draft.lengths), SLOTS, POSITIONS
    )
    assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_greedy_rows_of_a_mixed_batch_take_the_argmax(verifier):
    sampler = sampler_with(verifier, greedy=slice(0, B, 2))
    assert not sampler.all_greedy(SLOTS)
    assert sampler.all_greedy(SLOTS[::2]) and sampler.all_greedy(range(0, B, 2))
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(B, G + 1, V, generator=generator)
    tokens = torch.where(torch.rand(B, G, generator=generator) < 0.7, logits[:, :G].argmax(-1), 0)
    draft = Draft(tokens, None, torch.full((B,), G))
    mixed = sampler.verify(
        sampler.distribution(logits, SLOTS, POSITIONS, tokens), draft, SLOTS, POSITIONS
    )
    greedy = Sampler(B, V, "cpu", verifier)
    for row in range(B):
        greedy.admit(row, SamplingParams(), [0], set())
    only = greedy.verify(
        greedy.distribution(logits, SLOTS, POSITIONS, tokens), draft, SLOTS, POSITIONS
    )
    assert torch.equal(mixed.tokens[::2], only.tokens[::2])
    assert torch.equal(mixed.accepted[::2], only.accepted[::2])


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_without_drafts_verification_is_the_targets_own_draw(verifier):
    sampler = sampler_with(verifier)
    target = Probs(random_probs(2, B, 1, V), None)
    nothing = Draft(SLOTS.new_empty(B, 0), None, torch.zeros(B, dtype=torch.int64))
    verdict = sampler.verify(target, nothing, SLOTS, POSITIONS[:, :1])
    assert torch.equal(verdict.tokens[:, 0], sampler.draw(target, SLOTS, POSITIONS[:, 0]))
    # Rows that happen to propose nothing, in a round in which others do.
    none = Draft(random_draft(1).tokens, None, torch.zeros(B, dtype=torch.int64))
    wide = Probs(random_probs(3, B, G + 1, V), None)
    verdict = sampler.verify(wide, none, SLOTS, POSITIONS)
    own = sampler.draw(Probs(wide.probs[:, :1], None), SLOTS, POSITIONS[:, 0])
    assert torch.equal(verdict.tokens[:, 0], own)


def test_impossible_drafts_are_never_accepted():
    target = random_probs(2, B, G + 1, V)
    draft = random_draft(1)
    full = torch.full((B,), G)
    zeroed = target.scatter(-1, torch.cat([draft.tokens, draft.tokens[:, :1]], 1)[..., None], 0.0)
    undrawable = draft.probs.scatter(-1, draft.tokens[..., None], 0.0)
    for verifier in ("standard", "block"):
        for one_hot in (False, True):
            proposal = Draft(draft.tokens, None if one_hot else draft.probs, full)
            verdict = sampler_with(verifier).verify(Probs(zeroed, None), proposal, SLOTS, POSITIONS)
            assert verdict.accepted.eq(0).all()
        verdict = sampler_with(verifier).verify(
            Probs(target, None), Draft(draft.tokens, undrawable, full), SLOTS, POSITIONS
        )
        assert verdict.accepted.eq(0).all()


@pytest.mark.parametrize("verifier", ["standard", "block"])
def test_equal_distributions_accept_everything_in_fp32(verifier):
    probs = random_probs(2, B, G + 1, V)
    draft = Draft(random_draft(3).tokens, probs[:, :G].clone(), torch.full((B,), G))
    verdict = sampler_with(verifier).verify(Probs(probs, None), draft, SLOTS, POSITIONS)
    assert verdict.accepted.eq(G).all()


def test_noise_is_fresh_in_every_round_but_coupled_noise_is_not():
    probs = Probs(random_probs(2, B, 1, V), None)
    nothing = Draft(SLOTS.new_empty(B, 0), None, torch.zeros(B, dtype=torch.int64))
    for verifier in VERIFIERS:
        sampler = sampler_with(verifier)
        before = sampler.draw_draft(probs, SLOTS, POSITIONS[:, 3])
        assert torch.equal(before, sampler.draw_draft(probs, SLOTS, POSITIONS[:, 3]))
        own = sampler.draw(probs, SLOTS, POSITIONS[:, 3])
        verdict = sampler.verify(probs, nothing, SLOTS, POSITIONS[:, :1])
        counts, drafted = verdict.accepted + 1, torch.arange(B) % 2
        assert torch.equal(before, sampler.draw_draft(probs, SLOTS, POSITIONS[:, 3]))
        sampler.commit(SLOTS, verdict.tokens, counts, drafted)
        again = sampler.draw_draft(probs, SLOTS, POSITIONS[:, 3])
        assert torch.equal(own, sampler.draw(probs, SLOTS, POSITIONS[:, 3]))
        unchanged = before == again
        assert unchanged[drafted == 0].all(), "a row that drafted nothing has used no noise"
        assert unchanged[drafted > 0].all() == (verifier == "coupled")
        assert torch.equal(before, own) == (verifier == "coupled")


def test_coupled_verification_in_chunks_is_the_same(monkeypatch):
    from decoder.sampling import coupled

    draft, target = random_draft(1), Probs(random_probs(2, B, G + 1, V), None)
    whole = sampler_with("coupled").verify(target, draft, SLOTS, POSITIONS)
    monkeypatch.setattr(coupled, "_CHUNK_ELEMENTS", 1)
    chunked = sampler_with("coupled").verify(target, draft, SLOTS, POSITIONS)
    assert torch.equal(whole.tokens, chunked.tokens)


def test_logprobs_of_emitted_tokens():
    sampler = Sampler(2, V, "cpu", "standard")
    sampler.admit(0, SamplingParams(temperature=0.5, top_k=3), [0], set())
    sampler.admit(1, SamplingParams(), [0], set())
    logits = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(1))
    rows, positions = torch.arange(2), torch.arange(1, 4).expand(2, 3)
    target = sampler.distribution(logits, rows, positions)
    tokens = torch.stack([logits[0].argmax(-1), logits[1].argmax(-1)])
    tokens[0, 2] = -1
    got = sampler.logprobs(logits, target, tokens, 2)
    want = logits.log_softmax(-1)
    for b, q in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        torch.testing.assert_close(got.raw[b, q], want[b, q, tokens[b, q]])
        torch.testing.assert_close(got.top_raw[b, q], want[b, q].topk(2).values)
        assert got.top_ids[b, q].tolist() == want[b, q].topk(2).indices.tolist()
    law = (logits[0] / 0.5).masked_fill(logits[0] < logits[0].topk(3).values[:, -1:], -torch.inf)
    for q in range(2):
        torch.testing.assert_close(got.processed[0, q], law[q].log_softmax(-1)[tokens[0, q]])
    assert got.processed[1].eq(0).all()
    assert got.raw[0, 2].isnan() and got.processed[0, 2].isnan() and got.top_raw[0, 2].isnan().all()
    with pytest.raises(ValueError, match="logprobs must be <= the vocabulary size 12, got 13"):
        sampler.logprobs(logits, target, tokens, 13)


def test_logprobs_of_a_greedy_batch():
    sampler = sampler_with("standard", greedy=slice(0, B))
    logits = torch.randn(B, 2, V)
    target = sampler.distribution(logits, SLOTS, POSITIONS[:, :2])
    got = sampler.logprobs(logits.bfloat16(), target, target.argmax, 0)
    assert got.raw.dtype == torch.float32 and got.top_ids.shape == (B, 2, 0)
    assert got.processed.eq(0).all()

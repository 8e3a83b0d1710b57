"""L1: the law of emitted tokens, tested with exact p-values in a ragged multi-round loop."""

from __future__ import annotations

import math

import pytest
import torch
from support.toy_markov import (
    World,
    half_mixed_draft,
    joint_log_p,
    random_chain,
    sampler_of,
    transition_log_p,
)
from torch import Tensor

from decoder.requests.params import SamplingParams
from decoder.round import Draft

BAR = math.log(1e-9)
ROWS, LENGTH = 50_000, 5
TARGET = random_chain(1)
DRAFT = half_mixed_draft(TARGET, 2)


def assert_lossless(tokens: Tensor, chain: Tensor) -> None:
    assert transition_log_p(tokens, chain) > BAR
    assert joint_log_p(tokens, chain) > BAR


@pytest.mark.parametrize("one_hot", [False, True], ids=["sampled", "one-hot"])
@pytest.mark.parametrize("verifier", ["standard", "block", "coupled"])
def test_emitted_tokens_have_the_targets_law(verifier, one_hot):
    world = World(sampler_of(ROWS, verifier), TARGET, DRAFT, one_hot=one_hot)
    assert_lossless(world.generate(LENGTH), TARGET)


@pytest.mark.parametrize("verifier", ["standard", "block"])
def test_law_with_temperature_and_truncation(verifier):
    # The exact law of a truncated chain, computed here from its definition in fp64.
    params = SamplingParams(temperature=0.7, top_k=4, top_p=0.9, min_p=0.05)
    law = (TARGET / 0.7).softmax(dim=-1)
    law = torch.where(law < law.topk(4).values[:, -1:], 0.0, law)
    law = law / law.sum(-1, keepdim=True)
    ordered, order = law.sort(dim=-1, descending=True)
    keep = (ordered.cumsum(-1) - ordered < 0.9).scatter(
        1, order, ordered.cumsum(-1) - ordered < 0.9
    )
    law = torch.where(keep & (law >= 0.05 * law.amax(-1, keepdim=True)), law, 0.0)
    law = law / law.sum(-1, keepdim=True)

    tokens = World(sampler_of(ROWS, verifier, params), TARGET, DRAFT).generate(LENGTH)
    before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
    assert bool((law[before, tokens] > 0).all())
    for state in range(TARGET.shape[0]):
        support = law[state] > 0
        seen = torch.bincount(tokens[before == state], minlength=TARGET.shape[0])[support].double()
        wanted = seen.sum() * law[state][support]
        statistic = ((seen - wanted) ** 2 / wanted).sum()
        freedom = int(support.sum()) - 1
        if freedom:
            log_p = torch.special.gammaincc(torch.tensor(freedom / 2).double(), statistic / 2).log()
            assert log_p > BAR, f"state {state}"


class StopAfterUnlikely(World):
    """Stops drafting *after* a token its draft found improbable: that token is still verified."""

    def cut(self, draft: Draft) -> Draft:
        if draft.probs is None:
            return draft
        unlikely = draft.probs.gather(-1, draft.tokens[..., None])[..., 0] < 0.1
        return _cut_at(draft, unlikely, keep=1)


class EntropyGate(World):
    """Does not draft where the draft distribution is flat: a property of the context."""

    def cut(self, draft: Draft) -> Draft:
        if draft.probs is None:
            return draft
        entropy = -(draft.probs * draft.probs.log()).sum(dim=-1)
        return _cut_at(draft, entropy > 1.5, keep=0)


def _cut_at(draft: Draft, stop: Tensor, keep: int) -> Draft:
    first = (~stop).to(torch.int64).cumprod(dim=1).sum(dim=1) + keep
    return Draft(draft.tokens, draft.probs, torch.minimum(draft.lengths, first))


@pytest.mark.parametrize("verifier", ["standard", "block"])
@pytest.mark.parametrize("world", [StopAfterUnlikely, EntropyGate])
def test_stopping_times_of_the_draft_are_lossless(world, verifier):
    assert_lossless(world(sampler_of(ROWS, verifier), TARGET, DRAFT).generate(LENGTH), TARGET)


def test_block_accepts_more_than_standard():
    accepted = {}
    for verifier in ("standard", "block"):
        world = World(sampler_of(20_000, verifier), TARGET, DRAFT, ragged=False)
        zeros = torch.zeros(20_000, dtype=torch.int64)
        verdict = world.step(torch.arange(20_000), zeros, zeros, 5)
        accepted[verifier] = verdict.accepted.double().mean().item()
    assert accepted["block"] > 1.03 * accepted["standard"]


def test_a_perfect_draft_is_always_accepted():
    for verifier in ("standard", "block", "coupled"):
        world = World(sampler_of(2_000, verifier), TARGET, TARGET, ragged=False)
        zeros = torch.zeros(2_000, dtype=torch.int64)
        assert world.step(torch.arange(2_000), zeros, zeros, 3).accepted.eq(3).all(), verifier


def test_the_statistics_find_nothing_in_exact_samples_and_something_in_near_ones():
    generator = torch.Generator().manual_seed(0)

    def sample(chain: Tensor) -> Tensor:
        last, out = torch.zeros(ROWS, dtype=torch.int64), []
        for _ in range(LENGTH):
            last = torch.multinomial(chain.exp()[last], 1, generator=generator)[:, 0]
            out.append(last)
        return torch.stack(out, dim=1)

    assert_lossless(sample(TARGET), TARGET)
    warmer = (TARGET / 1.05).log_softmax(dim=-1)
    assert transition_log_p(sample(warmer), TARGET) < BAR

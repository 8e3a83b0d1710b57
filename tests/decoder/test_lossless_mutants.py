"""L1': negative controls. Every way of losing the law that we know of must be caught.

A test that never fails proves nothing: each mutant here is one mistake a speculative sampler can
make (several were shipped by well-known projects), and each is detected by the statistics of
`test_lossless_statistics` or, where statistics are blind, by a deterministic invariant.
"""

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

from decoder.round import Draft
from decoder.sampling import Sampler, rng
from decoder.sampling import sampler as sampler_module
from decoder.sampling.accept import accept_standard, drafted_probs
from decoder.sampling.block import accept_block
from decoder.sampling.rng import Stream
from decoder.sampling.verdict import leading, residual

CAUGHT = -40.0  # log p, beyond z = 8
ROWS, LENGTH = 50_000, 5
TARGET = random_chain(1)
DRAFT = half_mixed_draft(TARGET, 2)
POOR_DRAFT = random_chain(2)
LONG = {"gammas": (5,), "ragged": False}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evidence(world: World) -> float:
    tokens = world.generate(LENGTH)
    return min(transition_log_p(tokens, TARGET), joint_log_p(tokens, TARGET))


def assert_caught(
    world: type[World] = World,
    kind: type[Sampler] = Sampler,
    verifier: str = "standard",
    rows: int = ROWS,
    draft: torch.Tensor = DRAFT,
    **options,
) -> None:
    mutant = world(sampler_of(rows, verifier, kind=kind), TARGET, draft, **options)
    assert evidence(mutant) < CAUGHT


# 1. The declared draft distribution is not the one that was sampled.


class WrongTemperature(World):
    def declare(self, dist):
        return dist.probs[:, 0].log().div(1.15).softmax(dim=-1)


class SampledFromTopThree(World):
    def draw(self, rows, last, position, earlier):
        logits = self.draft.float()[last][:, None]
        full = self.sampler.distribution(logits, rows, position)
        third = full.probs.topk(3).values[..., -1:]
        cut = full._replace(probs=torch.where(full.probs < third, 0.0, full.probs))
        return self.sampler.draw_draft(cut, rows, position[:, 0]), full.probs[:, 0]


class GreedyTokenDenseProbs(World):
    def draw(self, rows, last, position, earlier):
        dist = self.sampler.distribution(self.draft.float()[last][:, None], rows, position)
        return dist.probs[:, 0].argmax(dim=-1), dist.probs[:, 0]


@pytest.mark.parametrize("world", [WrongTemperature, SampledFromTopThree, GreedyTokenDenseProbs])
@pytest.mark.parametrize("verifier", ["standard", "block"])
def test_declared_distribution_is_not_the_sampled_one(world, verifier):
    assert_caught(world, verifier=verifier)


class RoundedDraft(World):
    """Stores bf16 probabilities but samples fp32 ones: invisible to statistics."""

    def declare(self, dist):
        return dist.probs[:, 0].bfloat16().float()


def assert_drawn_from_stored(world: World) -> None:
    """L2: repeating the draw on the stored distribution gives the drafted token, bit for bit."""

    def check(draft, rows, positions):
        sampler = world.sampler
        for j in range(draft.gamma):
            stored = sampler_module.Probs(draft.probs[:, j : j + 1], None)
            drawn = sampler.draw_draft(stored, rows, positions[:, j])
            expected = draft.probs.new_tensor(int((drawn != draft.tokens[:, j]).sum()))
            assert expected == 0, f"{int(expected)} tokens not drawn from what is stored"
        sums = draft.probs.double().sum(dim=-1)
        assert bool((sums - 1).abs().max() < 1e-5), "a stored distribution does not sum to 1"

    world.check_draft = check
    world.generate(LENGTH)


@pytest.mark.parametrize("verifier", ["standard", "block", "coupled"])
def test_drafted_token_is_drawn_from_the_stored_distribution(verifier):
    assert_drawn_from_stored(World(sampler_of(ROWS, verifier), TARGET, DRAFT))


@pytest.mark.parametrize("world", [RoundedDraft, WrongTemperature, GreedyTokenDenseProbs])
def test_stored_distribution_invariant_catches(world):
    with pytest.raises(AssertionError, match=r"not drawn|sum to 1"):
        assert_drawn_from_stored(world(sampler_of(ROWS), TARGET, DRAFT))


# 2. Noise that is shared where it must not be.


@pytest.mark.parametrize("verifier", ["standard", "block"])
def test_shared_noise_between_draft_and_residual(verifier, monkeypatch):
    key = rng.key
    monkeypatch.setattr(rng, "key", lambda s, p, stream: key(s, p, Stream.TARGET))
    monkeypatch.setattr(Sampler, "_round_seeds", lambda self, rows: self._table.seeds[rows])
    assert_caught(verifier=verifier, rows=2 * ROWS)


class NoiseByPositionOnly(Sampler):
    def _round_seeds(self, rows):
        return self._table.seeds[rows]


def test_block_noise_used_again_at_a_rejected_position():
    assert_caught(kind=NoiseByPositionOnly, verifier="block", draft=POOR_DRAFT, **LONG)


def test_standard_rejection_may_reuse_it():
    # Token by token nothing after the rejected one has been looked at. This is why the block
    # mutant is easy to miss: the same code is right under standard rejection.
    sampler = sampler_of(ROWS, kind=NoiseByPositionOnly)
    assert evidence(World(sampler, TARGET, POOR_DRAFT, **LONG)) > math.log(1e-9)


# 3. A wrong test, a wrong residual, a wrong bonus.


def _accept_without_draft(target_probs, draft, uniforms):
    return leading(uniforms < drafted_probs(target_probs, draft)[0], draft.lengths)


def _accept_swapped(target_probs, draft, uniforms):
    target_x, draft_x = drafted_probs(target_probs, draft)
    return leading(uniforms * target_x < draft_x, draft.lengths)


def _accept_lenient(target_probs, draft, uniforms):
    return accept_standard(target_probs, draft, uniforms * 0.97)


@pytest.mark.parametrize(
    ("mutant", "rows"),
    [(_accept_without_draft, ROWS), (_accept_swapped, ROWS), (_accept_lenient, 4 * ROWS)],
)
def test_wrong_acceptance(mutant, rows, monkeypatch):
    monkeypatch.setattr(sampler_module, "accept_standard", mutant)
    assert_caught(rows=rows)


def _resample_from_target(target_probs, draft, accepted, weight=None):
    return target_probs[torch.arange(len(accepted)), accepted]


def _bonus_from_draft(target_probs, draft, accepted, weight=None):
    left = residual(target_probs, draft, accepted, weight)
    if draft.probs is None:
        return left
    full = (accepted == draft.lengths) & (accepted > 0)
    return torch.where(full[:, None], draft.probs[:, -1], left)


def _residual_without_weight(target_probs, draft, accepted, weight=None):
    return residual(target_probs, draft, accepted)


@pytest.mark.parametrize("mutant", [_resample_from_target, _bonus_from_draft])
@pytest.mark.parametrize("verifier", ["standard", "block"])
def test_wrong_next_token(mutant, verifier, monkeypatch):
    monkeypatch.setattr(sampler_module, "residual", mutant)
    assert_caught(verifier=verifier)


@pytest.mark.parametrize("verifier", ["standard", "block"])
def test_one_hot_draft_not_subtracted(verifier, monkeypatch):
    monkeypatch.setattr(sampler_module, "residual", _resample_from_target)
    assert_caught(verifier=verifier, one_hot=True)


def test_block_residual_without_its_weight(monkeypatch):
    monkeypatch.setattr(sampler_module, "residual", _residual_without_weight)
    assert_caught(verifier="block", draft=POOR_DRAFT, **LONG)


def test_block_rule_stopped_at_the_first_failure(monkeypatch):
    def first_failure(target_probs, draft, uniforms):
        """The longest passing prefix without looking past a failing one."""
        shorter = [
            accept_block(target_probs, draft, uniforms.clone().index_fill_(1, later, 2.0))
            for later in (torch.arange(i + 1, draft.gamma) for i in range(draft.gamma))
        ]
        alive = torch.ones(len(uniforms), dtype=torch.bool)
        accepted = torch.zeros(len(uniforms), dtype=torch.int64)
        weight = torch.ones(len(uniforms), dtype=torch.float64)
        for i, (count, w) in enumerate(shorter):
            alive &= count == i + 1
            accepted = torch.where(alive, count, accepted)
            weight = torch.where(alive, w, weight)
        return accepted, weight

    monkeypatch.setattr(sampler_module, "accept_block", first_failure)
    assert_caught(verifier="block")


# 4. Looking at a token before deciding whether it is verified.


class DropsUnlikely(World):
    def cut(self, draft):
        if draft.probs is None:
            return draft
        unlikely = draft.probs.gather(-1, draft.tokens[..., None])[..., 0] < 0.1
        return _cut_before(draft, unlikely)


class DropsEnding(World):
    def cut(self, draft):
        return _cut_before(draft, draft.tokens == TARGET.shape[0] - 1)


def _cut_before(draft: Draft, stop: torch.Tensor) -> Draft:
    return Draft(draft.tokens, draft.probs, leading(~stop, draft.lengths))


@pytest.mark.parametrize("world", [DropsUnlikely, DropsEnding])
@pytest.mark.parametrize("verifier", ["standard", "block"])
def test_dropping_a_drafted_token_by_looking_at_it(world, verifier):
    assert_caught(world, verifier=verifier)


# 5, 9. The target saw something else: stale cache positions, a shifted position, a neighbour's row.


class StaleContext(World):
    """2 % of rows see an old token in place of the current one."""

    def target_logits(self, context):
        context = context.clone()
        stale = torch.arange(len(context)) % 50 == 0
        context[stale, 0] = (context[stale, 0] + 1) % TARGET.shape[0]
        return super().target_logits(context)


class ShiftedPosition(World):
    def target_logits(self, context):
        return super().target_logits(torch.cat([context[:, :1], context[:, :-1]], dim=1))


class NeighboursRow(World):
    """One row in 20 gets half of its neighbour's probability, like experts that mix up tokens."""

    def target_logits(self, context):
        logits = super().target_logits(context)
        mixed = (0.5 * logits.exp() + 0.5 * logits.roll(1, 0).exp()).log()
        hit = (torch.arange(len(context)) % 20 == 0)[:, None, None]
        return torch.where(hit, mixed, logits)


@pytest.mark.parametrize(
    ("world", "rows"),
    [(StaleContext, 4 * ROWS), (ShiftedPosition, ROWS), (NeighboursRow, 2 * ROWS)],
)
def test_target_saw_the_wrong_context(world, rows):
    assert_caught(world, rows=rows)

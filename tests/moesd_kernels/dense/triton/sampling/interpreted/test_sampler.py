"""The decoder's sampler on the kernels emits what it emits in PyTorch, round after round."""

import pytest
import torch
from support.toy_markov import World, half_mixed_draft, random_chain, sampler_of

from decoder.model import kernels
from decoder.requests.params import SamplingParams
from decoder.round import Draft
from decoder.sampling import VERIFIERS, Sampler
from moesd_kernels.dense.triton.sampling import ops

TARGET = random_chain(1)
DRAFT = half_mixed_draft(TARGET, 2)
B, V = 3, 20


@pytest.fixture
def on_kernels(monkeypatch):
    """Makes samplers on the CPU use the interpreted kernels."""

    def use():
        monkeypatch.setattr(kernels, "sampling_ops", lambda device, dtype: ops)

    return use


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_rounds_of_a_toy_world(on_kernels, verifier):
    rules = SamplingParams(temperature=0.9, top_p=0.95, presence_penalty=0.2)
    worlds = [World(sampler_of(2, verifier, rules), TARGET, DRAFT, gammas=(2,)) for _ in range(2)]
    for world in worlds:
        world.sampler._adjustments._penalties[:] = world.sampler._adjustments._penalties[0].clone()
    expected = worlds[0].generate(2)
    on_kernels()
    assert torch.equal(worlds[1].generate(2), expected)


@pytest.mark.parametrize("greedy", [1, B])
def test_greedy_rows_beside_sampled_ones_and_alone(on_kernels, greedy):
    sampler = Sampler(B, V, "cpu")
    for row in range(B):
        params = SamplingParams(temperature=0.0 if row < greedy else 0.7, seed=row, top_k=6)
        sampler.admit(row, params, [0], set())
    rows, positions = torch.tensor([2, 0, 1]), torch.arange(3).expand(B, 3)
    logits = (4 * torch.randn(B, 3, V)).to(torch.bfloat16)
    best = logits[:, :2].argmax(-1)
    draft = Draft(best, None, torch.tensor([2, 2, 1]))

    def decided():
        probs = sampler.distribution(logits, rows, positions, best)
        verdict = sampler.verify(probs, draft, rows, positions)
        one = sampler.distribution(logits[:, :1], rows, positions[:, :1])
        drawn = sampler.draw(one, rows, positions[:, 0])
        return [probs.undefined, verdict.accepted, verdict.tokens, drawn]

    expected = decided()
    on_kernels()
    for actual, wanted in zip(decided(), expected, strict=True):
        assert actual.dtype == wanted.dtype and torch.equal(actual, wanted)

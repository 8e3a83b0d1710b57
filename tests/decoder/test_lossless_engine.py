"""L4 and L5: the real engine on small transformers, sampled.

L4: coupled output equals the target's own sampled output for the seed, token for token.
L5: a six-token vocabulary, every sequence of four tokens enumerated.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from support.tiny import VOCAB, perturbed, random_prompts, tiny_model
from support.toy_markov import pooled_log_p

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import DraftOptions, build_drafter
from decoder.sampling import Sampler
from decoder.sampling import sampler as sampler_module

SMALL, LENGTH = 6, 4
SEQUENCES = 10_000
TEMPERATURE = 1.5
BAR = math.log(1e-9)


REQUESTS = {
    "temperature": SamplingParams(temperature=1.0, seed=5, max_new_tokens=16),
    "top-k, top-p, min-p": SamplingParams(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, seed=11, max_new_tokens=16
    ),
    "penalties": SamplingParams(
        temperature=1.0,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        seed=2**40,
        max_new_tokens=16,
    ),
    "bias and minimum length": SamplingParams(
        temperature=1.2,
        logit_bias={3: 4.0, 9: float("-inf")},
        stop_token_ids=(3, 4, 5),
        min_new_tokens=6,
        seed=1,
        max_new_tokens=16,
    ),
    "greedy with penalties": SamplingParams(repetition_penalty=1.5, max_new_tokens=16),
    "greedy": SamplingParams(max_new_tokens=16),
}


@pytest.fixture(scope="module")
def pair():
    target = tiny_model("qwen3_moe", dtype=torch.float64)
    return target, perturbed(target, 3, 0.08)


def outputs(pair, drafter, gamma, verifier, prompts, params, batch=5):
    made = build_drafter(drafter, pair[0], options=DraftOptions(kernels=False))
    decoder = SpeculativeDecoder(
        pair[0], made, gamma, verifier, max_batch_size=batch, max_length=64, kernels=False
    )
    return [o.token_ids for o in decoder.generate(prompts, params)], decoder


@pytest.mark.parametrize("gamma", [1, 3, 6])
def test_coupled_equals_the_targets_own_sampling(pair, gamma):
    """All kinds of requests in one batch, rows used again, ragged prompts."""
    prompts = random_prompts(12, seed=1)
    params = [list(REQUESTS.values())[i % len(REQUESTS)] for i in range(12)]
    own, _ = outputs(pair, None, 0, "coupled", prompts, params, batch=1)
    got, decoder = outputs(pair, pair[1], gamma, "coupled", prompts, params)
    assert got == own
    assert 0.1 < decoder.stats.alpha < 1.0
    order = [7, 2, 11, 0, 5, 9, 1, 10, 3, 8, 6, 4]
    permuted, _ = outputs(
        pair, pair[1], gamma, "coupled", [prompts[i] for i in order], [params[i] for i in order]
    )
    assert permuted == [own[i] for i in order]


@pytest.mark.parametrize("drafter", ["ngram", "same"])
def test_coupled_does_not_depend_on_the_drafter(pair, drafter):
    prompts = random_prompts(6, seed=2)
    params = list(REQUESTS.values())
    own, _ = outputs(pair, None, 0, "coupled", prompts, params)
    draft = pair[0] if drafter == "same" else drafter
    got, decoder = outputs(pair, draft, 3, "coupled", prompts, params)
    assert got == own
    if drafter == "same":
        # Draft lengths are cut near the end of an output; every draft that counts is accepted.
        assert decoder.stats.alpha > 0.95


def test_coupled_without_the_drafted_prefix_is_caught(pair, monkeypatch):
    """Mutant 6: penalties and minimum lengths that ignore the drafts before a position."""
    prompts = random_prompts(12, seed=1)
    distribution = Sampler.distribution

    def forgetful(self, logits, rows, positions, prefix=None):
        return distribution(self, logits, rows, positions, None)

    for name in ("penalties", "greedy with penalties"):
        own, _ = outputs(pair, None, 0, "coupled", prompts, REQUESTS[name])
        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "distribution", forgetful)
            got, _ = outputs(pair, pair[1], 4, "coupled", prompts, REQUESTS[name])
        assert got != own, name


def test_minimum_length_counts_the_position_not_the_round(pair, monkeypatch):
    """Mutant 6 again: one `end allowed` decision per round lets an end in too early."""
    prompts = random_prompts(12, seed=1)
    params = REQUESTS["bias and minimum length"]
    own, _ = outputs(pair, None, 0, "coupled", prompts, params)
    assert all(len(tokens) >= 6 for tokens in own)
    distribution = Sampler.distribution

    def per_round(self, logits, rows, positions, prefix=None):
        return distribution(self, logits, rows, positions[:, -1:].expand_as(positions), prefix)

    monkeypatch.setattr(Sampler, "distribution", per_round)
    got, _ = outputs(pair, pair[1], 4, "coupled", prompts, params)
    assert got != own


@pytest.fixture(scope="module")
def small_world():
    """Target, draft, and the exact law of every sequence after the prompt [0]."""
    target = tiny_model("llama", seed=2, vocab_size=SMALL)
    every = torch.tensor(list(itertools.product(range(SMALL), repeat=LENGTH)))
    prompted = torch.cat([torch.zeros(len(every), 1, dtype=torch.int64), every], dim=1)
    with torch.no_grad():
        logits = target(input_ids=prompted[:, :-1]).logits.double() / TEMPERATURE
    law = logits.log_softmax(-1).gather(-1, every[..., None])[..., 0].sum(-1).exp()
    assert abs(float(law.sum()) - 1) < 1e-9
    return target, perturbed(target, 4, 0.3), law.numpy()


def sampled_log_p(small_world, verifier: str, drafter, gamma: int) -> tuple[float, float]:
    target, draft, law = small_world
    told = DraftOptions(kernels=False)
    decoder = SpeculativeDecoder(
        target,
        build_drafter(draft if drafter == "draft" else drafter, target, options=told),
        gamma,
        verifier,
        max_batch_size=2000,
        max_length=16,
        kernels=False,
    )
    params = [
        SamplingParams(temperature=TEMPERATURE, max_new_tokens=LENGTH, seed=seed)
        for seed in range(SEQUENCES)
    ]
    got = Counter(tuple(o.token_ids) for o in decoder.generate([[0]] * SEQUENCES, params))
    counts = np.array([got[s] for s in itertools.product(range(SMALL), repeat=LENGTH)])
    assert counts.sum() == SEQUENCES
    return pooled_log_p(counts.astype(float), SEQUENCES * law), decoder.stats.alpha or 0.0


@pytest.mark.parametrize("verifier", ["standard", "block"])
def test_every_sequence_of_a_small_vocabulary_has_its_probability(small_world, verifier):
    log_p, alpha = sampled_log_p(small_world, verifier, "draft", 3)
    assert log_p > BAR
    assert 0.2 < alpha < 0.95


def test_autoregressive_sampling_has_the_targets_law(small_world):
    assert sampled_log_p(small_world, "standard", None, 0)[0] > BAR


def test_swapped_distributions_are_caught(small_world, monkeypatch):
    from decoder.sampling.accept import drafted_probs
    from decoder.sampling.verdict import leading

    def swapped(target_probs, draft, uniforms):
        target_x, draft_x = drafted_probs(target_probs, draft)
        return leading(uniforms * target_x < draft_x, draft.lengths)

    monkeypatch.setattr(sampler_module, "accept_standard", swapped)
    assert sampled_log_p(small_world, "standard", "draft", 3)[0] < -40


def test_the_vocabulary_of_the_requests_is_the_models(pair):
    assert all(max(p.logit_bias or [0]) < VOCAB for p in REQUESTS.values())

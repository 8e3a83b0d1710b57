"""Speculative greedy output is the target's own, on every family, drafter and draft length.

The reference is a full forward of transformers' model for each token, without a cache. Everything
here is fp64 or fp32 and exact: one differing token fails.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.decoding import (
    NEW_TOKENS,
    PROMPTS,
    Audited,
    DoubleOnly,
    decoder_of,
    draft_of,
    model_of,
    recordings,
    references,
)
from support.scripted import GammaSchedule
from support.tiny import FAMILIES, tiny_model

from decoder import SamplingParams
from decoder.drafters import HybridDrafter, NgramDrafter, ReplayDrafter, SelfDrafter
from decoder.drafters.independent import IndependentDrafter

torch.set_num_threads(1)

GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS)
MOE = [f for f in FAMILIES if hasattr(tiny_model(f).config, "num_experts_per_tok")]
ALL = list(FAMILIES)


def outputs(decoder: Any, order: list[int] | None = None) -> list[list[int]]:
    order = order or list(range(len(PROMPTS)))
    produced = decoder.generate([PROMPTS[i] for i in order], GREEDY)
    by_prompt = dict(zip(order, (list(o.token_ids) for o in produced), strict=True))
    return [by_prompt[i] for i in range(len(PROMPTS))]


@pytest.mark.parametrize("gamma", range(7))
@pytest.mark.parametrize("family", ALL)
def test_noisy_oracle_at_every_draft_length(family: str, gamma: int) -> None:
    decoder = decoder_of(family, ReplayDrafter(0.7, recordings(family)), gamma)
    assert outputs(decoder) == references(family)
    assert decoder.stats.accepted > 0 or gamma == 0


@pytest.mark.parametrize("family", ALL)
def test_independent_draft_of_the_same_family(family: str) -> None:
    decoder = decoder_of(family, draft_of(family), GammaSchedule([3, 0, 5, 1]))
    assert outputs(decoder) == references(family)
    assert decoder.stats.accepted > 0


@pytest.mark.parametrize("family", MOE)
def test_self_draft(family: str) -> None:
    decoder = decoder_of(family, SelfDrafter(1), GammaSchedule([2, 4, 0]))
    assert outputs(decoder) == references(family)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_ngram_and_hybrid(family: str) -> None:
    assert outputs(decoder_of(family, NgramDrafter(3, 1), 4)) == references(family)
    hybrid = HybridDrafter(IndependentDrafter(draft_of(family)), threshold=2)
    assert outputs(decoder_of(family, hybrid, 3)) == references(family)


@pytest.mark.parametrize("family", ALL)
def test_perfect_drafts_are_all_accepted(family: str) -> None:
    decoder = decoder_of(family, ReplayDrafter(1.0, recordings(family)), 4)
    assert outputs(decoder) == references(family)
    # One token from the prefill, then five per round, the last round cut to what remains.
    rounds = -(-(NEW_TOKENS - 1) // 5)
    assert decoder.stats.row_rounds == rounds * len(PROMPTS)


@pytest.mark.parametrize("family", ALL)
def test_adversarial_drafts_are_all_rejected(family: str) -> None:
    decoder = decoder_of(family, ReplayDrafter(0.0, recordings(family)), 4)
    assert outputs(decoder) == references(family)
    assert decoder.stats.accepted == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "mistral", "gpt_oss", "deepseek_v3"])
def test_batch_size_and_order_do_not_matter(family: str) -> None:
    for batch, order in ((1, [5, 4, 3, 2, 1, 0]), (2, [3, 0, 2, 5, 1, 4]), (8, None)):
        replay = ReplayDrafter(0.7, recordings(family), seed=batch)
        schedule = GammaSchedule([3, 6, 0, 1])
        assert outputs(decoder_of(family, replay, schedule, batch), order) == references(family)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "gpt_oss", "gemma2", "opt", "phimoe"])
def test_single_precision(family: str) -> None:
    single = torch.float32
    expected = references(family, single)
    for drafter in (draft_of(family, single), ReplayDrafter(0.7, recordings(family))):
        decoder = decoder_of(family, drafter, GammaSchedule([4, 2, 0]), dtype=single)
        assert outputs(decoder) == expected


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_automatic_gamma(family: str) -> None:
    decoder = decoder_of(family, draft_of(family), "auto")
    assert outputs(decoder) == references(family)


@pytest.mark.parametrize("gamma", [1, 4, 6])
def test_end_of_sequence_at_every_accept_position(gamma: int) -> None:
    """Stop on the n-th token of every output: the end falls on every place within a round."""
    family = "qwen3_moe"
    decoder = decoder_of(family, ReplayDrafter(1.0, recordings(family)), gamma)
    cases = [(i, n) for i in range(len(PROMPTS)) for n in range(NEW_TOKENS - 1)]
    params = [
        SamplingParams(max_new_tokens=NEW_TOKENS, stop_token_ids=(references(family)[i][n],))
        for i, n in cases
    ]
    produced = decoder.generate([PROMPTS[i] for i, _ in cases], params)
    for (i, n), output in zip(cases, produced, strict=True):
        expected = references(family)[i]
        end = expected.index(expected[n])
        assert list(output.token_ids)[: end + 1] == expected[: end + 1][: len(output.token_ids)]
        assert len(output.token_ids) in (end, end + 1), (i, n)


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_cache_equals_a_fresh_prefill_under_poison(family: str) -> None:
    replay = Audited(ReplayDrafter(0.6, recordings(family)))
    with DoubleOnly():
        decoder = decoder_of(family, replay, 4)
        assert outputs(decoder) == references(family)
    assert replay.audits >= 10
    assert replay.worst <= 1e-10


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_self_draft_leaves_nothing_in_the_shared_cache(family: str) -> None:
    audited = Audited(SelfDrafter(1))
    with DoubleOnly():
        decoder = decoder_of(family, audited, 3)
        assert outputs(decoder) == references(family)
    assert audited.worst <= 1e-10


def test_reference_model_is_untouched() -> None:
    """The decoder must leave the model as it found it: same output through plain transformers."""
    model, ids = model_of("qwen3_moe"), torch.tensor([PROMPTS[0]])
    before = model(ids).logits
    outputs(decoder_of("qwen3_moe", SelfDrafter(1), 3))
    assert torch.equal(model(ids).logits, before)

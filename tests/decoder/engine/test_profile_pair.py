"""The profile of two decoders: costs of rounds and prompts, and nothing else is left of it."""

import itertools
import time

import pytest
import torch
from support.tiny import ragged_prompts, tiny_moe

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import ReplayDrafter
from decoder.drafters.independent import IndependentDrafter
from decoder.engine.profile_pair import profile_pair
from decoder.gamma.step_cost import CorrectedCost

PROMPTS = ragged_prompts(6, seed=3)
PARAMS = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def models():
    return tiny_moe(dtype=torch.float32), tiny_moe(1, 1, torch.float32)


def pair(models, gamma, drafter="independent", max_length=256):
    target, draft = models
    drafters = {"independent": lambda: IndependentDrafter(draft), "none": lambda: None,
                "replay": lambda: ReplayDrafter(0.9)}  # fmt: skip
    options = {"max_batch_size": 6, "max_length": max_length, "max_gamma": 4}
    return (
        SpeculativeDecoder(target, None, 0, **options),
        SpeculativeDecoder(target, drafters[drafter](), gamma, **options),
    )


def test_costs_are_those_of_rounds_and_the_run_is_as_without_them(models):
    plain, speculative = pair(models, "auto")
    expected = plain.generate(PROMPTS, PARAMS)
    before = [(d.controller, d.stats) for d in (plain, speculative)]
    costs = profile_pair(plain, speculative, PROMPTS, PARAMS)
    for batch in (1, 4, 6):
        # Four draft steps are four forwards more; a stall of the machine may hide one of them.
        assert costs.rounds(batch, 4, 0) > costs.rounds(batch, 0, 0) > 0
    assert costs.plain_prompt > 0 < costs.speculative_prompt
    assert [(d.controller, d.stats) for d in (plain, speculative)] == before
    assert isinstance(speculative.controller._costs, CorrectedCost)
    assert plain.is_idle() and speculative.is_idle()
    outputs = speculative.generate(PROMPTS, PARAMS)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


@pytest.mark.parametrize(
    ("gamma", "drafter", "max_length"),
    [(0, "independent", 256), ("auto", "none", 256), (2, "replay", 256), (4, "independent", 12)],
)
def test_where_there_is_nothing_to_time(models, gamma, drafter, max_length):
    plain, speculative = pair(models, gamma, drafter, max_length)
    assert profile_pair(plain, speculative, PROMPTS, PARAMS) is None
    assert plain.is_idle() and speculative.is_idle()


def test_a_late_prefill_of_the_draft_counts_as_prefill(models, monkeypatch):
    plain, speculative = pair(models, 4)
    step, calls, late = speculative.step, itertools.count(), 0.4

    def slow_second_step():
        if next(calls) == 1:
            time.sleep(late)
        return step()

    monkeypatch.setattr(speculative, "step", slow_second_step)
    costs = profile_pair(plain, speculative, PROMPTS, PARAMS)
    assert costs.speculative_prompt * len(PROMPTS) > late > costs.plain_prompt * len(PROMPTS)
    assert costs.rounds(len(PROMPTS), 4, 0) < late

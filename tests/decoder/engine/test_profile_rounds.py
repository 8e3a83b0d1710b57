"""The start-up profile: measured with the decoder itself, leaving no trace but the costs."""

from types import SimpleNamespace

import pytest
import torch
from support.tiny import ragged_prompts, tiny_moe

from decoder import SamplingParams, SpeculativeDecoder, profile_rounds
from decoder.drafters import ReplayDrafter
from decoder.drafters.base import StatelessDrafter, empty_draft
from decoder.drafters.independent import IndependentDrafter
from decoder.engine import profile_rounds as profiling
from decoder.engine.phases import PhaseClock
from decoder.gamma.step_cost import CorrectedCost

torch.set_num_threads(1)


class Silent(StatelessDrafter):
    """Never proposes anything."""

    def propose(self, state, gamma):
        return empty_draft(state, gamma)


def decoder_with(drafter, gamma="auto", **options):
    settings = {"max_batch_size": 4, "max_length": 64, "max_gamma": 4} | options
    return SpeculativeDecoder(tiny_moe(dtype=torch.float32), drafter, gamma, **settings)


def test_costs_are_measured_for_every_batch_and_gamma():
    decoder = decoder_with(IndependentDrafter(tiny_moe(1, 1, torch.float32)))
    assert profile_rounds(decoder, budget_s=60)
    costs = decoder.controller._costs
    assert isinstance(costs, CorrectedCost)
    for batch in (1, 2, 4):
        # Four draft steps are four forwards more; a stall of the machine may hide one of them.
        assert costs.seconds(batch, 4, 32) > costs.seconds(batch, 0, 32) > 0


def test_output_and_statistics_are_as_without_it():
    prompts, params = ragged_prompts(6, seed=3), SamplingParams(max_new_tokens=12)
    draft = tiny_moe(1, 1, torch.float32)
    plain = decoder_with(IndependentDrafter(draft), 2).generate(prompts, params)
    decoder = decoder_with(IndependentDrafter(draft))
    profile_rounds(decoder, budget_s=60)
    assert decoder.stats.sequences == 0
    outputs = decoder.generate(prompts, params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]


def test_a_replay_drafter_is_profiled_with_drafts():
    decoder = decoder_with(ReplayDrafter(0.9))
    assert profile_rounds(decoder, budget_s=60)


def test_left_alone_when_there_is_nothing_to_profile():
    fixed = decoder_with(ReplayDrafter(0.9), 2)
    assert not profile_rounds(fixed) and fixed.controller.gamma == 2
    assert not profile_rounds(decoder_with(ReplayDrafter(0.9), max_length=20))
    slow = decoder_with(ReplayDrafter(0.9))
    before = slow.controller
    assert not profile_rounds(slow, budget_s=0.0) and slow.controller is before
    silent = decoder_with(Silent())
    before = silent.controller
    assert not profile_rounds(silent, budget_s=60) and silent.controller is before
    assert len(silent.generate([[7, 8, 9]], SamplingParams(max_new_tokens=4))) == 1


def test_a_full_round_that_captured_a_graph_is_left_out(monkeypatch):
    captures = iter([0, 1, 1, 1, 2, 2, 2, 2])  # asked again where there are more
    monkeypatch.setattr(profiling, "captured", lambda: next(captures))
    log = profiling.RoundLog(2)
    for place, made in enumerate((True, False, True, False)):
        log.observe(2, 3, [2] * 3, [place] * 3, {"verify": float(place)})
        assert (place in log.capturing) == made
    log.observe(2, 2, [2] * 2, [1] * 2, {"verify": 9.0})
    assert log.full(3) == [(12, {"verify": 3.0})], "of the others, the first warms up"


def test_phases_are_timed_on_the_stream_of_the_models_device(monkeypatch):
    """The current device may be another one, whose stream has nothing to do."""
    recorded = []
    event = SimpleNamespace(
        record=recorded.append, synchronize=lambda: None, elapsed_time=lambda later: 2.0
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = PhaseClock(torch.device("cuda", 1))
    clock.start()
    clock.mark("verify")
    assert clock.stop()["verify"] == pytest.approx(0.002)
    assert recorded == ["stream of cuda:1"] * 2

"""Imposed verdicts: replay's coin decides, whatever the target's rounding makes of a recording."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from support.device.fake_graphs import fake_graphs
from support.tiny import ragged_prompts, tiny_moe

from bench.measure.telemetry import ExpertCounter
from bench.runs import decode
from bench.runs.decode import measure_batch
from bench.runs.forced import force
from bench.runs.subject import Subject
from bench.workloads.models import draft_like, moe_310m, random_model
from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import ReplayDrafter

NEW, GAMMA = 24, 4


def recorded_decoder(alpha: float, recordings) -> tuple[SpeculativeDecoder, ReplayDrafter]:
    replay = ReplayDrafter(alpha, recordings)
    return decoder_of(replay), replay


def decoder_of(drafter: ReplayDrafter | None) -> SpeculativeDecoder:
    return SpeculativeDecoder(tiny_moe(), drafter, GAMMA, max_batch_size=4, kernels=False)


def outputs_of(decoder: SpeculativeDecoder, prompts) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    return [list(output.token_ids) for output in decoder.generate(prompts, params)]


def test_a_true_recording_is_accepted_as_the_real_verdict_would():
    prompts = ragged_prompts(4)
    wanted = outputs_of(decoder_of(None), prompts)
    recordings = dict(zip(map(tuple, prompts), wanted, strict=True))
    real, _ = recorded_decoder(0.8, recordings)
    imposed, replay = recorded_decoder(0.8, recordings)
    sampler = force(imposed, replay)
    assert outputs_of(imposed, prompts) == outputs_of(real, prompts) == wanted
    assert imposed.stats.sigma == real.stats.sigma
    assert sampler.agreement() == 1.0


def test_acceptance_is_the_coins_on_a_text_the_target_would_never_write():
    """What rounding does to a GPU's recordings, at its worst: no recorded token is the argmax."""
    prompts = ragged_prompts(4)
    generator = torch.Generator().manual_seed(1)
    recordings = {
        tuple(p): torch.randint(6, 97, (NEW,), generator=generator).tolist() for p in prompts
    }
    real, _ = recorded_decoder(0.9, recordings)
    outputs_of(real, prompts)
    imposed, replay = recorded_decoder(0.9, recordings)
    sampler = force(imposed, replay)
    outputs = outputs_of(imposed, prompts)
    # The first token is the prompt's own; from there on the row follows its recording.
    assert [o[1:] for o in outputs] == [recordings[tuple(p)][1:] for p in prompts]
    assert real.stats.sigma < 0.3 < 0.7 < imposed.stats.sigma
    agreement = sampler.agreement()
    assert agreement is not None and agreement < 0.2


def test_graphs_follow_recordings_that_outgrow_their_place(monkeypatch):
    fake_graphs(monkeypatch)
    target = tiny_moe()
    target.set_experts_implementation("batched_mm")  # the eager experts look at their tokens
    replay = ReplayDrafter(0.9)
    options = {"max_batch_size": 3, "kernels": False, "attention": "portable", "static": True}
    decoder = SpeculativeDecoder(target, replay, GAMMA, **options)
    force(decoder, replay)
    generator = torch.Generator().manual_seed(1)
    for seed, length in ((0, NEW), (1, 300)):
        prompts = ragged_prompts(3, seed=seed)
        for prompt in prompts:
            text = torch.randint(6, 97, (length,), generator=generator).tolist()
            replay.recordings[tuple(prompt)] = text
        outputs = outputs_of(decoder, prompts)
        recorded = [replay.recordings[tuple(prompt)][1 : NEW - 1] for prompt in prompts]
        assert [output[1:-1] for output in outputs] == recorded, "the last is drawn without a draft"


def test_without_a_comparison_there_is_no_agreement():
    decoder, replay = recorded_decoder(0.5, {})
    assert force(decoder, replay).agreement() is None


@pytest.fixture
def subject() -> Subject:
    config = moe_310m(num_hidden_layers=2, hidden_size=128, moe_intermediate_size=64)
    target = random_model(config, torch.float32)
    return Subject(target, random_model(draft_like(config), torch.float32, seed=1), alpha=0.9)


def test_a_forced_cell_claims_no_identity(subject, monkeypatch):
    options = {"prompt_tokens": 6, "new_tokens": 16, "repetitions": 1}
    (real,) = measure_batch(subject, 3, [GAMMA], **options)
    monkeypatch.setattr(Subject, "forced", property(lambda self: True))
    (imposed,) = measure_batch(subject, 3, [GAMMA], **options)
    assert real.identical is True and real.agreement is None
    assert imposed.identical is None and imposed.agreement == 1.0
    assert imposed.sigma == real.sigma


def test_experts_are_counted_where_no_module_is_called(subject):
    """The CPU walks layers in C++ and a GPU replays graphs: neither runs a module's hooks."""
    (pair,) = measure_batch(subject, 3, [2], prompt_tokens=6, new_tokens=12, repetitions=1)
    top_k, experts = 4, 64
    assert pair.experts_ar is not None and pair.experts_verify is not None
    assert top_k <= pair.experts_ar <= 3 * top_k
    assert pair.experts_ar < pair.experts_verify <= min(experts, 9 * top_k)


def test_only_whole_rounds_are_counted(subject, monkeypatch):
    """A prefill's last layer has one token of each row in a speculative run, too."""
    calls = {0: [(3, 9), (3, 11), (12, 20)], 2: [(3, 4), (6, 12), (9, 15)]}

    @contextmanager
    def counted(_model):
        counter = ExpertCounter()
        yield counter
        counter.calls += calls.pop(min(calls))

    monkeypatch.setattr(decode, "count_experts", counted)
    runs = decode._Runs(subject, 3, [2], 20)
    assert runs.experts([[5, 6, 7]] * 3, 4) == {3: 10.0, 9: 15.0}

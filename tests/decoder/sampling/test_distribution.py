"""Processed distributions against transformers' own logits processors, and their independence."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoder.requests.params import SamplingParams
from decoder.sampling import Sampler

V = 700  # more than twice the candidates that top-p looks at first
PROMPT = [3, 5, 5, 9]
STOP = {11, 12}


def logits_of(rows: int, positions: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, positions, V, generator=generator)


def transformers_probs(
    params: SamplingParams, logits: torch.Tensor, output: list[int]
) -> torch.Tensor:
    """Transformers' processors in the order of its ``_get_logits_processor``."""
    p, processors = params, LogitsProcessorList()
    if p.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[t], b] for t, b in p.logit_bias.items()]))
    if p.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.min_new_tokens:
        processors.append(
            MinNewTokensLengthLogitsProcessor(len(PROMPT), p.min_new_tokens, sorted(STOP))
        )
    if p.temperature != 1:
        processors.append(TemperatureLogitsWarper(p.temperature))
    if p.top_k:
        processors.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        processors.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        processors.append(MinPLogitsWarper(p.min_p))
    ids = torch.tensor([PROMPT + output])
    return processors(ids, logits.clone()[None])[0].softmax(-1)


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 20},
    "top-k of one": {"top_k": 1},
    "top-k beyond the vocabulary": {"top_k": 10_000},
    "narrow nucleus": {"top_p": 0.5},
    "nucleus wider than the candidates": {"top_p": 0.98, "temperature": 3.0},
    "min-p": {"min_p": 0.05},
    "everything": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "logit_bias": {3: 2.0, 7: -1.5, 20: float("-inf")},
        "min_new_tokens": 6,
    },
    "bias and penalty": {"logit_bias": {5: 4.0}, "repetition_penalty": 0.7},
    "minimum length": {"min_new_tokens": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers_at_every_position_of_a_draft(name):
    params = SamplingParams(**{"temperature": 1.0, **CASES[name]})
    sampler = Sampler(3, V, "cpu", "standard")
    sampler.admit(1, params, PROMPT, STOP)
    committed, drafted = [9, 40], [40, 41, 3]
    sampler.commit(torch.tensor([1]), torch.tensor([[*committed, -1]]), torch.tensor([2]))
    logits = logits_of(1, 4)
    positions = len(PROMPT) + len(committed) + torch.arange(4)[None]
    got = sampler.distribution(logits, torch.tensor([1]), positions, torch.tensor([drafted])).probs
    for j in range(4):
        want = transformers_probs(params, logits[0, j], committed + drafted[:j])
        assert torch.equal(got[0, j] > 0, want > 0)
        torch.testing.assert_close(got[0, j], want, rtol=2e-5, atol=1e-9)


def test_draft_sees_the_same_penalties_as_the_target():
    """One position at a time with all drafts so far, as a drafter asks, or all at once."""
    params = SamplingParams(temperature=1.0, presence_penalty=0.7, frequency_penalty=0.4)
    sampler = Sampler(1, V, "cpu", "standard")
    sampler.admit(0, params, PROMPT, STOP)
    rows, drafted = torch.tensor([0]), torch.tensor([[40, 40, 3]])
    logits, positions = logits_of(1, 4), torch.arange(4, 8)[None]
    together = sampler.distribution(logits, rows, positions, drafted).probs
    for j in range(4):
        one = sampler.distribution(
            logits[:, j : j + 1], rows, positions[:, j : j + 1], drafted[:, :j]
        )
        assert torch.equal(one.probs[:, 0], together[:, j])
    without = sampler.distribution(logits, rows, positions, None).probs
    assert not torch.equal(without[:, 1:], together[:, 1:])


def test_presence_and_frequency_count_the_output_only():
    sampler = Sampler(1, V, "cpu", "standard")
    params = SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    sampler.admit(0, params, PROMPT, set())
    sampler.commit(torch.tensor([0]), torch.tensor([[8, 8, 30]]), torch.tensor([3]))
    logits = logits_of(1, 1)
    want = logits[0, 0].clone()
    want[8] -= 0.5 + 2 * 0.25
    want[30] -= 0.5 + 0.25
    got = sampler.distribution(logits, torch.tensor([0]), torch.tensor([[7]])).probs[0, 0]
    torch.testing.assert_close(got, want.softmax(-1))


def test_rows_do_not_depend_on_their_neighbours_parameters():
    plain = SamplingParams(temperature=1.0, seed=4)
    others = [
        SamplingParams(),
        SamplingParams(temperature=0.3, top_p=0.7),
        SamplingParams(temperature=1.0, top_k=3, min_p=0.2),
        SamplingParams(temperature=1.0, repetition_penalty=2.0, logit_bias={0: 5.0, 1: 1.0}),
        SamplingParams(temperature=1.0, min_new_tokens=9, frequency_penalty=1.0),
    ]
    alone, mixed = Sampler(6, V, "cpu", "standard"), Sampler(6, V, "cpu", "standard")
    alone.admit(0, plain, PROMPT, STOP)
    mixed.admit(0, plain, PROMPT, STOP)
    for row, params in enumerate(others, start=1):
        mixed.admit(row, params, PROMPT, STOP)
    logits, positions = logits_of(6, 3), torch.arange(4, 7).expand(6, 3)
    prefix = torch.zeros(6, 2, dtype=torch.int64)
    got = mixed.distribution(logits, torch.arange(6), positions, prefix).probs
    want = alone.distribution(logits[:1], torch.tensor([0]), positions[:1], prefix[:1]).probs
    assert torch.equal(got[:1], want)
    assert torch.equal(got[1].max(-1).indices, logits[1].argmax(-1))  # the greedy row is one-hot
    assert torch.equal(got[1].sum(-1), torch.ones(3)) and torch.equal(
        got[1].amax(-1), torch.ones(3)
    )


def test_one_position_equals_the_same_position_of_many():
    params = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01)
    sampler = Sampler(5, V, "cpu", "standard")
    for row in range(5):
        sampler.admit(row, params, PROMPT, STOP)
    logits, positions = logits_of(5, 4), torch.arange(4, 8).expand(5, 4)
    whole = sampler.distribution(logits, torch.arange(5), positions).probs
    for b in range(5):
        for q in range(4):
            one = sampler.distribution(
                logits[b : b + 1, q : q + 1], torch.tensor([b]), positions[b : b + 1, q : q + 1]
            )
            assert torch.equal(one.probs[0, 0], whole[b, q])


def test_ties_at_the_cut_are_kept_together():
    sampler = Sampler(2, 8, "cpu", "standard")
    sampler.admit(0, SamplingParams(temperature=1.0, top_k=2), [0], set())
    sampler.admit(1, SamplingParams(temperature=1.0, top_p=0.3), [0], set())
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]).repeat(2, 1, 1)
    logits[1] = 0.0
    kept = sampler.distribution(logits, torch.arange(2), torch.ones(2, 1).long()).probs > 0
    assert kept[0, 0].tolist() == [True] * 4 + [False] * 4
    assert kept[1, 0].all()


def test_greedy_batches_carry_an_argmax_only_and_take_the_lowest_index():
    sampler = Sampler(2, V, "cpu", "block")
    for row in range(2):
        sampler.admit(row, SamplingParams(top_p=0.5, top_k=3), PROMPT, STOP)
    logits = torch.zeros(2, 2, V, dtype=torch.bfloat16)
    logits[1, 0, 300:310] = 1.0
    before = logits.clone()
    got = sampler.distribution(logits, torch.arange(2), torch.ones(2, 2).long())
    assert got.probs is None
    assert got.argmax.tolist() == [[0, 0], [300, 0]]
    assert torch.equal(logits, before)


def test_greedy_obeys_penalties_and_minimum_length():
    sampler = Sampler(1, V, "cpu", "standard")
    sampler.admit(
        0,
        SamplingParams(min_new_tokens=2, logit_bias={50: -9.0}, presence_penalty=9.0),
        PROMPT,
        STOP,
    )
    logits = torch.zeros(1, 3, V)
    logits[..., 11], logits[..., 50], logits[..., 60], logits[..., 61] = 10.0, 9.0, 8.0, 7.0
    positions = torch.arange(4, 7)[None]
    got = sampler.distribution(logits, torch.tensor([0]), positions, torch.tensor([[60, 61]]))
    assert got.argmax.tolist() == [[60, 61, 11]]


def test_logits_are_left_alone_and_fp64_stays_fp64():
    sampler = Sampler(1, V, "cpu", "standard")
    sampler.admit(0, SamplingParams(temperature=0.5, top_k=4, logit_bias={1: 3.0}), PROMPT, STOP)
    logits = logits_of(1, 2).double()
    before = logits.clone()
    got = sampler.distribution(logits, torch.tensor([0]), torch.tensor([[4, 5]]))
    assert torch.equal(logits, before)
    assert got.probs.dtype == torch.float64


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "all banned"])
def test_logits_without_a_distribution_are_reported(temperature, bad):
    sampler = Sampler(3, V, "cpu", "standard")
    for row in range(3):
        sampler.admit(row, SamplingParams(temperature=temperature), PROMPT, STOP)
    logits = logits_of(2, 2)
    if bad == "all banned":
        logits[1, 1] = float("-inf")
    else:
        logits[1, 1, 5] = bad
    rows, positions = torch.tensor([0, 2]), torch.tensor([[4, 5], [4, 5]])
    if temperature == 0.0 and bad == float("inf"):
        assert sampler.distribution(logits, rows, positions).argmax[1, 1] == 5
        return
    got = sampler.distribution(logits, rows, positions)
    assert got.undefined.tolist() == [[False, False], [False, True]]


def test_a_greedy_row_has_its_argmax_whatever_its_neighbours_sample():
    """+inf has no softmax but is an argmax."""
    sampler = Sampler(2, V, "cpu", "standard")
    sampler.admit(0, SamplingParams(), PROMPT, STOP)
    sampler.admit(1, SamplingParams(temperature=1.0), PROMPT, STOP)
    logits, positions = logits_of(2, 1), torch.full((2, 1), 4)
    logits[:, 0, 5] = float("inf")
    got = sampler.distribution(logits, torch.arange(2), positions)
    assert got.undefined.tolist() == [[False], [True]]
    assert got.probs[0, 0].argmax() == 5 and got.probs[0, 0].sum() == 1


def test_a_released_row_leaves_nothing_behind():
    sampler = Sampler(1, V, "cpu", "standard")
    first = SamplingParams(
        temperature=0.5, top_k=2, repetition_penalty=3.0, logit_bias={1: 9.0}, min_new_tokens=50
    )
    sampler.admit(0, first, PROMPT, STOP)
    sampler.commit(torch.tensor([0]), torch.tensor([[8]]), torch.tensor([1]))
    sampler.release(0)
    sampler.admit(0, SamplingParams(temperature=1.0), PROMPT, STOP)
    logits = logits_of(1, 1)
    got = sampler.distribution(logits, torch.tensor([0]), torch.tensor([[4]])).probs
    assert torch.equal(got, logits.softmax(-1))
    sampler.release(0)
    sampler.admit(0, SamplingParams(temperature=1.0, repetition_penalty=2.0), [1], set())
    got = sampler.distribution(logits, torch.tensor([0]), torch.tensor([[4]])).probs[0, 0]
    want = logits[0, 0].clone()
    want[1] = want[1] * 2 if want[1] < 0 else want[1] / 2
    torch.testing.assert_close(got, want.softmax(-1))


@pytest.mark.parametrize(
    ("params", "prompt", "stop", "message"),
    [
        (SamplingParams(), [V], set(), r"prompt ids must be in \[0, 700\), got 700"),
        (SamplingParams(logit_bias={V: 1.0}), [1], set(), "logit_bias ids"),
        (SamplingParams(), [1], {-1}, "stop ids must be"),
        (SamplingParams(logprobs=V + 1), [1], set(), "logprobs must be <= 700, got 701"),
    ],
)
def test_requests_that_do_not_fit_the_vocabulary_are_refused(params, prompt, stop, message):
    sampler = Sampler(1, V, "cpu", "standard")
    with pytest.raises(ValueError, match=message):
        sampler.admit(0, params, prompt, stop)


def test_wrong_arguments_are_refused():
    with pytest.raises(
        ValueError, match="verifier must be one of standard, block, coupled, got 'x'"
    ):
        Sampler(1, V, "cpu", "x")
    with pytest.raises(ValueError, match=r"logits must be \[B, Q, 700\], got \[1, 1, 9\]"):
        Sampler(1, V, "cpu", "block").distribution(
            torch.zeros(1, 1, 9), torch.tensor([0]), torch.tensor([[0]])
        )


def test_a_request_admitted_in_inference_mode_can_be_released_outside_of_it():
    sampler = Sampler(1, V, "cpu", "standard")
    params = SamplingParams(logit_bias={1: 1.0, 2: 1.0}, min_new_tokens=2, presence_penalty=1.0)
    with torch.inference_mode():
        sampler.admit(0, params, PROMPT, STOP)
    sampler.commit(torch.tensor([0]), torch.tensor([[3]]), torch.tensor([1]))
    sampler.release(0)
    sampler.admit(0, params, PROMPT, STOP)

"""Numbers that define no distribution cost the rows that meet them, and leave nothing behind."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.decoding import decoder
from support.tiny import greedy_reference, perturbed, ragged_prompts, tiny_moe

from decoder import SamplingParams, profile_rounds
from decoder.drafters.base import StatelessDrafter
from decoder.errors import RequestFailed, UserError
from decoder.round import Draft

torch.set_num_threads(1)

BAD = 96  # a token whose embedding is not a number
NEW = 10
PROMPTS = ragged_prompts(4, seed=2)
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)


def broken(model: Any, value: float = float("nan")) -> Any:
    other = copy.deepcopy(model)
    other.get_input_embeddings().weight.data[BAD] = value
    return other


@pytest.fixture(scope="module")
def whole() -> Any:
    model = tiny_moe(dtype=torch.float32)  # which the kernels take
    # Nothing but a prompt or a draft may bring the bad token in.
    model.lm_head.weight.data[BAD] = 0
    return model


@pytest.fixture(scope="module")
def expected(whole: Any) -> list[list[int]]:
    found = [greedy_reference(whole, prompt, NEW, eos=False) for prompt in PROMPTS]
    assert not any(BAD in tokens for tokens in found)
    return found


@pytest.fixture(params=[("portable", False), ("auto", True)], ids=["portable", "kernels"])
def options(request: Any) -> Iterator[dict[str, Any]]:
    yield dict(zip(("attention", "kernels"), request.param, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_meets_them_is_lost_alone(whole, expected, options, value):
    engine = decoder(broken(whole, value), "ngram", 2, max_batch_size=2, **options)
    bad = {"token_ids": [7, BAD, *range(20, 40)], "id": "x"}
    prompts = [PROMPTS[0], bad, *PROMPTS[1:], bad]
    with pytest.raises(RequestFailed, match="2 of 6 requests failed: prompt 'x': logits") as caught:
        engine.generate(prompts, GREEDY)
    assert isinstance(caught.value, FloatingPointError)
    outputs = caught.value.outputs
    assert [output.index for output in outputs] == list(range(6))
    assert [o.token_ids for o in outputs] == [expected[0], [], *expected[1:], []]
    assert [o.finish_reason for o in outputs] == ["length", "error", *["length"] * 3, "error"]
    assert all((o.error is None) == (o.finish_reason == "length") for o in outputs)
    # Rows used again, shorter than what failed in them: a masked NaN would still be one.
    again = engine.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in again] == expected


class Insisting(StatelessDrafter):
    """Always proposes the bad token."""

    def propose(self, state, gamma):
        return Draft(
            torch.full((len(state.rows), gamma), BAD), None, torch.full_like(state.lengths, gamma)
        )


@pytest.mark.parametrize("verifier", ["standard", "block", "coupled"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_only_a_draft_meets_changes_nothing(whole, options, verifier, temperature):
    """Without speculation no such number would have come up."""
    params = SamplingParams(max_new_tokens=6, temperature=temperature, seed=3, ignore_eos=True)
    plain = decoder(broken(whole), None, 0, verifier=verifier, **options)
    engine = decoder(broken(whole), Insisting(), 2, verifier=verifier, **options)
    wanted = [output.token_ids for output in plain.generate(PROMPTS, params)]
    got = [output.token_ids for output in engine.generate(PROMPTS, params)]
    if temperature and verifier != "coupled":
        assert [len(tokens) for tokens in got] == [6] * len(PROMPTS), "the law alone is the same"
    else:
        assert got == wanted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("verifier", ["standard", "block", "coupled"])
def test_a_draft_model_without_a_distribution_drafts_nothing(whole, temperature, verifier):
    draft = perturbed(whole)
    draft.lm_head.weight.data.fill_(float("nan"))
    params = SamplingParams(max_new_tokens=6, temperature=temperature, seed=3)
    plain = decoder(whole, None, 0, verifier=verifier).generate(PROMPTS, params)
    engine = decoder(whole, draft, 3, verifier=verifier)
    outputs = engine.generate(PROMPTS, params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert engine.stats.drafted == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_weights_at_fault_are_named_once(whole, options, value, caplog):
    model = copy.deepcopy(whole)
    model.model.norm.weight.data[3] = value
    engine = decoder(model, None, 0, **options)
    for _ in range(2):
        assert all(output.error for output in engine.stream(PROMPTS, GREEDY))
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["weights with NaN or infinities: model.norm.weight"]


def test_a_model_that_cannot_be_tried_for_its_weights_says_so(whole):
    model = copy.deepcopy(whole)
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("inf")
    said = r"weights must be numbers, got NaN or infinities in model\.layers\.0\.self_attn\.q_proj"
    try:
        engine = decoder(model, None, 0)
    except UserError as error:
        assert re.search(said, str(error))
    else:
        assert all(output.undefined for output in engine.stream(PROMPTS, GREEDY))


def test_a_model_of_nothing_else_fails_every_request(whole):
    model = copy.deepcopy(whole)
    model.lm_head.weight.data.fill_(float("nan"))
    engine = decoder(model, "self", 2)
    outputs = list(engine.stream(PROMPTS * 3, GREEDY))
    assert len(outputs) == 12 and all("logits must define" in o.error for o in outputs)
    assert engine.is_idle()
    assert not profile_rounds(decoder(model, "self", "auto")), "the prompts will say it"
    with pytest.raises(FloatingPointError, match=r"12 of 12 .* prompt 4: .*; and 7 more$"):
        engine.generate(PROMPTS * 3, GREEDY)

"""Sampling parameters: every bad value is refused with what was expected and what came."""

import pytest

from decoder import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", None),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("min_new_tokens", -1),
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("a",)),
        ("logprobs", -1),
    ],
)
def test_refuses_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .*, got"):
        SamplingParams(**{name: value})


def test_normalises_json_values():
    params = SamplingParams(stop="x", stop_token_ids=[3], logit_bias={"7": 1})
    assert params.stop == ("x",)
    assert params.stop_token_ids == (3,)
    assert params.logit_bias == {7: 1.0}
    assert SamplingParams(logit_bias={}).logit_bias is None
    assert params.greedy


def test_updated_changes_copies_and_refuses_unknown_names():
    params = SamplingParams(temperature=0.5)
    assert params.updated({"top_k": 3}) == SamplingParams(temperature=0.5, top_k=3)
    assert params.top_k == 0
    with pytest.raises(ValueError, match="unknown sampling parameter 'topk'"):
        params.updated({"topk": 3})


def test_is_frozen_and_hashable():
    params = SamplingParams(stop=["a"])
    with pytest.raises(AttributeError):
        params.seed = 1
    assert hash(params) == hash(SamplingParams(stop=("a",)))

"""Sampling parameters: every bad value is refused with what was expected and what came."""

import math

import numpy as np
import pytest
import torch

from decoder import SamplingParams

REFUSED = [
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
    # Beyond what fp32 logits bear.
    ("temperature", 1e-40),
    ("temperature", 1e30),
    ("temperature", float("inf")),
    ("temperature", 10**400),
    ("repetition_penalty", 1e38),
    ("repetition_penalty", 1e-38),
    ("presence_penalty", 1e38),
    ("frequency_penalty", -1e38),
    ("logit_bias", {1: 1e38}),
    ("logit_bias", {1: 10**400}),
    # Numbers of the wrong kind.
    ("temperature", True),
    ("temperature", None),
    ("temperature", torch.tensor([1.0, 2.0])),
    ("top_k", 1.5),
    ("top_k", np.float64(1.5)),
    ("top_k", torch.tensor(True)),
    ("top_k", np.True_),
    ("seed", "7"),
    ("logprobs", True),
    # Containers of the wrong kind.
    ("stop", {"a": 1}),
    ("stop", b"a"),
    ("stop", 5),
    ("stop_token_ids", {3: 1}),
    ("stop_token_ids", [True]),
    ("stop_token_ids", "3"),
    ("logit_bias", "abc"),
    ("logit_bias", [3]),
    ("logit_bias", {1.5: 1.0}),
    ("logit_bias", {"x": 1.0}),
    ("logit_bias", {1: "1"}),
    ("ignore_eos", "no"),
    ("ignore_eos", 1),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_refuses_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_what_python_does_not_print_is_refused_all_the_same():
    with pytest.raises(ValueError, match=r"seed must be .*, got a very large int"):
        SamplingParams(seed=10**5000)


def test_scalars_of_other_libraries_are_numbers():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_p=torch.tensor(0.25),
        top_k=np.int64(3),
        seed=torch.tensor(4),
        max_new_tokens=5.0,
        stop_token_ids=np.array([1, 2]),
        logit_bias={np.int32(7): torch.tensor(1.5), 8: -1e30},
        ignore_eos=np.True_,
    )
    assert params == SamplingParams(
        temperature=0.5, top_p=0.25, top_k=3, seed=4, max_new_tokens=5, stop_token_ids=(1, 2),
        logit_bias={7: 1.5, 8: -math.inf}, ignore_eos=True,
    )  # fmt: skip
    for name in ("temperature", "top_k", "seed", "max_new_tokens"):
        assert type(getattr(params, name)) in (int, float), "JSON takes Python's numbers only"
    assert SamplingParams(max_new_tokens=10**5000, top_k=10**30, min_new_tokens=10**30).greedy


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
    with pytest.raises(ValueError, match="unknown sampling parameter 1; known"):
        params.updated({1: 2, "topk": 3})


def test_is_frozen_and_hashable():
    params = SamplingParams(stop=["a"])
    with pytest.raises(AttributeError):
        params.seed = 1
    assert hash(params) == hash(SamplingParams(stop=("a",)))


def test_a_number_may_be_an_integer_of_any_size():
    """An int beyond 64 bits would fit into no tensor."""
    for value in (10**20, np.int64(3), True + 1):
        temperature = SamplingParams(temperature=value).temperature
        assert type(temperature) is float and temperature == float(value)

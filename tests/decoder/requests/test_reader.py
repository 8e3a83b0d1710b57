"""Reading a request: everything that can be known to be wrong with it is said then, and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from decoder import SamplingParams
from decoder.errors import UserError
from decoder.requests.reader import Request, RequestReader, Unreadable

VOCAB, LENGTH, EOS = 10, 20, 3


class Words:
    """A tokenizer of digits that raises as real ones do."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        text.encode()  # a lone surrogate has no bytes
        return {"input_ids": [int(letter) for letter in text]}


READER = RequestReader(Words(), VOCAB, LENGTH, frozenset({EOS, VOCAB + 5}))
BANNED = dict.fromkeys(range(VOCAB), float("-inf"))
BUT_EOS = {token: value for token, value in BANNED.items() if token != EOS}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"token_ids": [1], "logit_bias": {VOCAB: 1}}, "logit_bias ids must be in [0, 10), got 10"),
        ({"token_ids": [1], "logit_bias": {10**30: 1}}, "logit_bias ids must be in [0, 10), got"),
        ({"token_ids": [1], "logprobs": 11}, "logprobs must be at most the vocabulary's 10, got"),
        ({"token_ids": [1], "logprobs": 10**30}, "logprobs must be at most"),
        ({"token_ids": [1], "logit_bias": BANNED}, "every token banned"),
        ({"token_ids": [1], "logit_bias": dict.fromkeys(BANNED, -1e30)}, "every token banned"),
        ({"token_ids": [1], "logit_bias": BUT_EOS, "min_new_tokens": 1}, "every token banned"),
        ({"token_ids": [1], "temperature": 1e-40}, "temperature must be"),
        ({"token_ids": [1], "stop": 5}, "stop must be a list of strings, got 5"),
        ({"token_ids": [1], 5: 5}, "unknown sampling parameter 5"),
        ({"prompt": "1\ud800"}, "cannot be tokenized: "),
        ({"prompt": "one"}, "cannot be tokenized: "),
        ({"prompt": ""}, "expected at least one token"),
        ({"token_ids": "12", "prompt": None}, None),
        ({"token_ids": [1.5]}, "expected text or a list of token ids, got 1.5 in it"),
        ({"token_ids": [True]}, "got True in it"),
        ({"token_ids": ["1"]}, "got '1' in it"),
        ({"token_ids": [[1]]}, "got [1] in it"),
        ({"token_ids": [None]}, "got None in it"),
        ({"token_ids": [1, -1]}, "token ids must be in [0, 10), got -1"),
        ({"token_ids": [10**5000]}, "token ids must be in [0, 10), got a very large int"),
        ({"token_ids": [1] * LENGTH}, "20 tokens leave no room in a context of 20"),
        (b"12", "expected text or a list of token ids, got bytes"),
        ({1, 2}, "expected text or a list of token ids, got set"),
        (torch.ones(2, 2).long(), "got [1, 1] in it"),
        (torch.tensor(3), "expected text or a list of token ids, got Tensor"),
        (None, "expected text or a list of token ids, got NoneType"),
        ({}, "expected exactly one of"),
    ],
)
def test_what_is_wrong_is_said_with_its_name(prompt: Any, message: str | None) -> None:
    if message is None:
        assert READER.read(0, prompt, SamplingParams()).prompt_ids == [1, 2]
        return
    with pytest.raises(UserError) as caught:
        READER.read(4, prompt, SamplingParams())
    assert str(caught.value).startswith("prompt 4: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    if isinstance(prompt, dict):
        with pytest.raises(UserError, match=r"^prompt 'a\\ud800': "):
            READER.read(4, {**prompt, "id": "a\ud800"}, SamplingParams())


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2],
        (1, 2),
        range(1, 3),
        np.array([1, 2]),
        torch.tensor([1, 2]),
        [np.int32(1), torch.tensor(2)],
        [1.0, np.float64(2)],
        iter([1, 2]),
    ],
)
def test_whole_numbers_are_token_ids_whatever_holds_them(ids: Any) -> None:
    request = READER.read(0, ids, SamplingParams())
    assert request.prompt_ids == [1, 2] and {type(i) for i in request.prompt_ids} == {int}


def test_what_no_model_emits_ends_nothing() -> None:
    """As in transformers: ids outside the vocabulary, the model's own or the caller's."""
    request = READER.read(0, [1], SamplingParams(stop_token_ids=(2, VOCAB, 10**30)))
    assert request.stop_ids == {2, EOS}


def test_what_can_be_huge_and_harmless_is_cut_to_the_room() -> None:
    params = SamplingParams(max_new_tokens=10**30, min_new_tokens=10**30, top_k=10**30)
    assert READER.read(0, [1, 2], params).max_new_tokens == LENGTH - 2
    bias = SamplingParams(logit_bias=BUT_EOS)
    assert READER.read(0, [1], bias).params.logit_bias == BUT_EOS


def test_a_prompt_that_is_wrong_stops_no_other() -> None:
    prompts = [[1], {"token_ids": [99], "id": "x"}, "12", {"prompt": "no", "id": 7}, [3]]
    found = list(READER.read_all(iter(prompts), [SamplingParams()] * 4))
    assert [type(item) for item in found] == [Request, Unreadable, Request, Unreadable, Unreadable]
    wrong = [item for item in found if isinstance(item, Unreadable)]
    assert [(item.index, item.id, item.prompt) for item in wrong] == [
        (1, "x", None),
        (3, 7, "no"),
        (4, None, None),
    ]
    assert str(wrong[0].error) == "prompt 'x': token ids must be in [0, 10), got 99"
    assert "expected one SamplingParams per prompt, got 4" in str(wrong[2].error)
    again = [item for item in found if isinstance(item, Request)]
    assert list(READER.read_all(again, SamplingParams())) == again, "read requests pass as they are"


def test_sampled_requests_without_a_seed_draw_one() -> None:
    torch.manual_seed(1)
    seeds = [READER.read(0, [1], SamplingParams(temperature=1.0)).params.seed for _ in range(3)]
    assert len(set(seeds)) == 3 and None not in seeds
    torch.manual_seed(1)
    assert READER.read(0, [1], SamplingParams(temperature=1.0)).params.seed == seeds[0]
    assert READER.read(0, [1], SamplingParams(temperature=1.0, seed=5)).params.seed == 5
    before = torch.random.get_rng_state()
    assert READER.read(0, [1], SamplingParams()).params.seed is None
    assert torch.equal(before, torch.random.get_rng_state()), "greedy requests draw nothing"


def test_params_of_another_kind_are_named() -> None:
    (found,) = READER.read_all([[1]], {"max_new_tokens": 2})
    assert isinstance(found, Unreadable)
    assert str(found.error) == "prompt 0: params must be SamplingParams, got dict"


@pytest.mark.parametrize(
    ("prompts", "what"), [("12", "string"), (b"12", "string"), ({"token_ids": [1]}, "mapping")]
)
def test_one_prompt_is_not_taken_for_several(prompts: Any, what: str) -> None:
    with pytest.raises(TypeError, match=f"iterable of prompts, got a single {what}"):
        READER.read_each(prompts)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_parameters_are_as_many_as_prompts(count: int) -> None:
    with pytest.raises(UserError, match=f"one SamplingParams per prompt, got {count}"):
        READER.read_each(["1", "2"], [SamplingParams()] * count)

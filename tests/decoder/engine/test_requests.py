"""What the engine is asked: prompts with parameters of their own, and what it refuses."""

import pytest
import torch
from support.decoding import decoder
from support.tiny import MOE_VOCAB, ragged_prompts, tiny_moe

from decoder import SamplingParams
from decoder.errors import UserError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def target():
    return tiny_moe()


@pytest.fixture(scope="module")
def prompts():
    return ragged_prompts(3)


def test_outputs_arrive_as_they_finish(target, prompts):
    params = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (9, 2, 5)]
    order = [o.index for o in decoder(target).stream(prompts[:3], params)]
    assert order == [1, 2, 0]
    seen = []
    outputs = decoder(target).generate(prompts[:3], params, on_output=seen.append)
    assert [o.index for o in seen] == [1, 2, 0]
    assert [o.index for o in outputs] == [0, 1, 2]


def test_mapping_prompts_carry_ids_and_parameters(target, prompts):
    outputs = decoder(target).generate(
        [{"token_ids": prompts[0], "id": "a", "max_new_tokens": 3, "ignore_eos": True}, prompts[1]],
        SamplingParams(max_new_tokens=6, ignore_eos=True),
    )
    assert [(o.id, len(o.token_ids)) for o in outputs] == [("a", 3), (None, 6)]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        ([MOE_VOCAB], rf"must be in \[0, {MOE_VOCAB}\), got {MOE_VOCAB}"),
        ("text", "needs a tokenizer"),
        ({"prompt": "a", "token_ids": [1]}, "exactly one of"),
        ({"token_ids": [7], "top_q": 1}, "unknown sampling parameter 'top_q'"),
        ([7] * 300, "300 tokens leave no room in a context"),
        (3.5, "expected text or a list of token ids, got float"),
        ({"token_ids": [7], "stop": ["x"]}, "stop strings need a tokenizer"),
    ],
)
def test_bad_prompts_are_named(target, prompt, message):
    with pytest.raises(UserError, match=message):
        decoder(target).generate([[7], prompt])


def test_bad_settings_are_refused(target):
    with pytest.raises(UserError, match="gamma must be 'auto' or an integer >= 0, got -1"):
        decoder(target, "ngram", -1)
    with pytest.raises(UserError, match="gamma must be 'auto' or an integer >= 0, got 'x'"):
        decoder(target, "ngram", "x")
    with pytest.raises(UserError, match="max_batch_size must be at least 1, got 0"):
        decoder(target, max_batch_size=0)
    with pytest.raises(UserError, match="max_length must be in"):
        decoder(target, max_length=1)
    with pytest.raises(TypeError, match="got a single string"):
        decoder(target).generate("abc")

"""What the engine is asked: prompts with parameters of their own, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from support.decoding import decoder
from support.tiny import MOE_VOCAB, LetterTokenizer, ragged_prompts, tiny_moe

from decoder import SamplingParams
from decoder.errors import UserError
from decoder.requests.reader import NotYet

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


def test_outputs_of_requests_are_in_the_order_of_the_argument(target, prompts):
    """Whoever read them numbered them."""
    engine = decoder(target)
    numbers = (7, 0, 0)
    requests = [
        engine.reader.read(i, {"token_ids": p, "id": f"r{n}"}, SamplingParams(max_new_tokens=9 - n))
        for n, (i, p) in enumerate(zip(numbers, prompts, strict=False))
    ]
    for order in (1, -1):
        asked = [prompts[0], *requests[::order]]
        outputs = engine.generate(asked, SamplingParams(max_new_tokens=2))
        assert [o.id for o in outputs] == [None, *(r.id for r in requests[::order])]


def test_a_request_of_another_decoder_is_checked_like_a_prompt(target, prompts):
    long, short = decoder(target, max_length=64), decoder(target, max_length=16)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    request = long.reader.read(0, prompts[1], params)
    with pytest.raises(UserError, match="expected 1 to 12 new tokens after a prompt of 4, got 40"):
        short.add(request)
    with pytest.raises(UserError, match="prompt 0: expected 1 to 12 new tokens"):
        short.generate([prompts[2][:3], request])
    assert short.is_idle()
    good, bad = sorted(
        short.stream([prompts[2][:3], request], params), key=lambda o: o.error is not None
    )
    assert good.error is None and len(good.token_ids) == 13 and "12 new tokens" in bad.error
    alien = replace(request, max_new_tokens=2, prompt_ids=[MOE_VOCAB])
    with pytest.raises(UserError, match=f"token ids below {MOE_VOCAB}"):
        long.add(alien)


def test_what_is_added_meanwhile_is_nobodys_output(target, prompts):
    """A follow-up question, asked where an answer is heard."""
    engine = decoder(target)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    heard = []

    def hear(output):
        heard.append(output.index)
        if len(heard) == 1:
            engine.add(prompts[2], params)

    assert [o.index for o in engine.generate(prompts[:2], params, on_output=hear)] == [0, 1]
    assert len(heard) == 3
    request = engine.reader.read(0, prompts[0], params)
    with pytest.raises(UserError, match="every request once"):
        engine.generate([request, request])


def test_a_stream_answers_before_the_next_prompt_is_there(target, prompts):
    """Whoever asks one thing after another gets answers, with rows free or not."""
    engine = decoder(target, max_batch_size=4)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    answered = []

    def asked():
        for prompt in prompts[:2]:
            yield prompt
            count = len(answered)
            while not engine.is_idle():
                yield NotYet()
            assert len(answered) == count + 1

    for output in engine.stream(asked(), params):
        answered.append(output)
    alone = [engine.generate([prompt], params)[0].token_ids for prompt in prompts[:2]]
    assert [(o.index, o.token_ids) for o in answered] == list(enumerate(alone))


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


def test_what_cannot_be_read_costs_nobody_else(target, prompts):
    wrong = [
        {"token_ids": [1], "logit_bias": {5000: 1.0}, "id": "bias"},
        {"token_ids": [1], "logprobs": 5000},
        [MOE_VOCAB + 3],
        [7] * 300,
        5,
    ]
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    engine = decoder(target, "ngram", 3, max_batch_size=1)
    expected = [o.token_ids for o in engine.generate(prompts, params)]
    mixed = [*wrong, prompts[0], *wrong, prompts[1], prompts[2], *wrong]
    for prompt in wrong:
        with pytest.raises(UserError, match=r"^prompt ('bias'|1): "):
            engine.generate([prompts[0], prompt], params)
        assert engine.is_idle() and engine.stats.sequences == 3, "nothing was decoded"
        with pytest.raises(UserError):
            engine.add(prompt)
        assert engine.is_idle()
    outputs = list(engine.stream(iter(mixed), params))
    assert [o.index for o in outputs] == list(range(len(mixed)))
    assert [o.token_ids for o in outputs if o.error is None] == expected
    failed = [o for o in outputs if o.error is not None]
    assert len(failed) == 15 and {o.finish_reason for o in failed} == {"error"}
    assert failed[0].id == "bias" and failed[0].error.startswith("prompt 'bias': logit_bias ids")
    assert list(engine.stream(wrong, params)) and engine.is_idle()
    assert [o.token_ids for o in engine.generate(prompts, params)] == expected


EXTREMES = [
    {"temperature": 1e-20},
    {"temperature": 1e20},
    {"temperature": 1e-20, "presence_penalty": 1e9, "frequency_penalty": 1e9},
    {"temperature": 1.0, "presence_penalty": -1e9, "frequency_penalty": -1e9},
    {"temperature": 1.0, "repetition_penalty": 1e6},
    {"temperature": 1e-20, "repetition_penalty": 1e-6},
    {"temperature": 1.0, "top_p": 1e-300, "min_p": 1.0, "top_k": 10**30},
    {"temperature": 1e-20, "logit_bias": {9: 1e9, 8: -1e300}},
    {"max_new_tokens": 10**30, "min_new_tokens": 10**30},
    {"temperature": 1.0, "seed": 2**63 - 1},
    {"stop": ["\ud800", "x" * 10_000]},
    {"stop_token_ids": [10**30, 5000]},
]


@pytest.mark.parametrize("verifier", ["standard", "block", "coupled"])
def test_the_ends_of_every_range_work(target, prompts, verifier):
    engine = decoder(target, "self", 2, verifier=verifier, tokenizer=LetterTokenizer())
    asked = [{"token_ids": prompts[2], "max_new_tokens": 6} | extra for extra in EXTREMES]
    outputs = engine.generate(asked)
    assert all(0 <= token < MOE_VOCAB for o in outputs for token in o.token_ids)
    assert all(o.token_ids for o in outputs)
    assert [len(o.token_ids) for o in outputs][8] == 256 - len(prompts[2])

"""A decoder driven by ``add`` and ``step`` alone, as a server or a scheduler would."""

from collections import defaultdict

import pytest
import torch
from support.decoding import decoder
from support.tiny import LetterTokenizer, ragged_prompts, tiny_moe

from decoder import SamplingParams
from decoder.errors import RequestFailed, UserError

torch.set_num_threads(1)
NEW = 14
GREEDY = SamplingParams(max_new_tokens=NEW)
SAMPLED = SamplingParams(max_new_tokens=NEW, temperature=0.8, seed=3)


@pytest.fixture(scope="module")
def target():
    return tiny_moe()


@pytest.fixture(scope="module")
def prompts():
    return ragged_prompts(9)


class Client:
    """What a server keeps: each request's tokens as they came, and outputs as they ended."""

    def __init__(self, engine):
        self.engine = engine
        self.streamed, self.outputs = defaultdict(list), {}

    def step(self):
        assert not self.engine.is_idle()
        for progress in self.engine.step():
            assert progress.token_ids, "nothing is reported of a sequence that gained nothing"
            assert progress.request not in self.outputs, "an ended request gained a token"
            self.streamed[progress.request] += progress.token_ids
            if progress.output is not None:
                self.outputs[progress.request] = progress.output

    def finish(self):
        while not self.engine.is_idle():
            self.step()


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafter", [None, "ngram", "self"])
def test_added_and_cancelled_mid_run_outputs_are_those_of_generate(
    target, prompts, drafter, params
):
    make = lambda: decoder(target, drafter, 3, verifier="coupled")
    expected = [output.token_ids for output in make().generate(prompts, params)]
    client = Client(make())
    first = [client.engine.add(prompt, params) for prompt in prompts[:6]]
    for _ in range(4):
        client.step()
    cancelled = client.engine.cancel(first[2])
    assert cancelled.finish_reason == "cancelled"
    assert (
        cancelled.token_ids == client.streamed[first[2]] == expected[2][: len(cancelled.token_ids)]
    )
    assert 0 < len(cancelled.token_ids) < len(expected[2])
    late = [client.engine.add(prompt, params) for prompt in prompts[6:]]
    client.finish()
    for request, tokens in zip([*first, *late], expected, strict=True):
        if request is not first[2]:
            assert client.streamed[request] == client.outputs[request].token_ids == tokens
    assert first[2] not in client.outputs
    assert client.engine.stats.sequences == len(prompts) - 1


def test_tokens_come_as_they_are_decided(target, prompts):
    client = Client(decoder(target, None, 0))
    request = client.engine.add(prompts[0], SamplingParams(max_new_tokens=6, ignore_eos=True))
    for count in range(1, 7):
        client.step()
        assert len(client.streamed[request]) == count
    assert client.engine.is_idle() and client.outputs[request].finish_reason == "length"


def test_requests_wait_until_a_row_is_free(target, prompts):
    client = Client(decoder(target, None, 0, max_batch_size=2))
    requests = [client.engine.add(prompt, GREEDY) for prompt in prompts]
    assert client.engine.cancel(requests[-1]) is None, "it was waiting"
    assert [request.index for request in requests] == list(range(len(prompts)))
    client.step()
    assert set(client.streamed) == set(requests[:2])
    client.finish()
    assert set(client.outputs) == set(requests[:-1])


def test_long_outputs_do_not_keep_short_ones_waiting(target, prompts):
    """After many short outputs a few rows are not worth a prefill, unless they stay idle."""
    client = Client(decoder(target, None, 0, max_batch_size=8))
    short, long = (SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (3, 60))
    for _ in range(50):
        client.engine.add(prompts[0], short)
    client.finish()
    for prompt in prompts[:5]:
        client.engine.add(prompt, long)
    client.step()
    request = client.engine.add(prompts[5], short)
    for _ in range(4):
        client.step()
    assert request in client.streamed, "three rows idle for three rounds cost more than a prefill"


def test_a_cancelled_row_is_free_at_once(target, prompts):
    client = Client(decoder(target, "ngram", 3, max_batch_size=1))
    first, second = (client.engine.add(prompt, GREEDY) for prompt in prompts[:2])
    client.step()
    client.engine.cancel(first)
    client.step()
    assert list(client.streamed) == [first, second]
    assert client.engine.cancel(first) is None, "it is no longer in the decoder"
    client.finish()
    assert (
        client.outputs[second].token_ids
        == decoder(target).generate(prompts[1:2], GREEDY)[0].token_ids
    )


def test_mappings_texts_and_requests_can_be_added(target):
    client, params = Client(decoder(target, tokenizer=LetterTokenizer())), GREEDY
    requests = [
        client.engine.add({"prompt": "hello", "id": "a"}, params),
        client.engine.add("hello", params),
        client.engine.add(client.engine.reader.read(7, "hello", params)),
    ]
    client.finish()
    outputs = [client.outputs[request] for request in requests]
    assert len({tuple(output.token_ids) for output in outputs}) == 1
    assert [output.index for output in outputs] == [0, 1, 7]
    assert [output.id for output in outputs] == ["a", None, None]


def test_what_cannot_be_added_leaves_the_others_alone(target, prompts):
    client = Client(decoder(target))
    request = client.engine.add(prompts[0], GREEDY)
    with pytest.raises(UserError, match="at least one token, got an empty prompt"):
        client.engine.add([])
    with pytest.raises(ValueError, match="request 0 is in the decoder already"):
        client.engine.add(request)
    with pytest.raises(ValueError, match="no params beside a request"):
        client.engine.add(request, GREEDY)
    with pytest.raises(RuntimeError, match="expected an idle decoder"):
        client.engine.generate(prompts)
    client.finish()
    assert list(client.outputs) == [request]


def test_an_idle_decoder_does_nothing(target, prompts):
    engine = decoder(target)
    assert engine.is_idle() and engine.step() == []
    engine.add(prompts[0])
    engine.step()
    assert not engine.is_idle()
    engine.clear()
    assert engine.is_idle() and engine.step() == []


def test_an_admission_that_failed_frees_its_rows(target, prompts, monkeypatch):
    engine = decoder(target, max_batch_size=2)
    expected = [output.token_ids for output in engine.generate(prompts[:3], GREEDY)]
    with monkeypatch.context() as patch:
        patch.setattr(engine.sampler, "draw", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(RequestFailed, match="3 of 3 requests failed: prompt 0: MemoryError"):
            engine.generate(prompts[:3], GREEDY)
    assert engine.is_idle()
    assert [output.token_ids for output in engine.generate(prompts[:3], GREEDY)] == expected

"""Two callers of one decoder: the second is refused, whatever threads they are on."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
from support.decoding import decoder, model_of
from support.generation import from_threads
from support.tiny import greedy_reference, random_prompts

from decoder import SamplingParams

PROMPTS = random_prompts(6, seed=5)
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [greedy_reference(model_of("llama"), prompt, 12, eos=False) for prompt in PROMPTS]


def tokens(outputs: Any) -> list[list[int]]:
    return [output.token_ids for output in sorted(outputs, key=lambda output: output.index)]


def test_threads_get_their_own_outputs_or_an_error(expected):
    engine = decoder(model_of("llama"), "ngram", 2)
    results = from_threads(lambda: tokens(engine.generate(PROMPTS, PARAMS)))
    assert expected in results
    refused = [result for result in results if result != expected]
    assert set(refused) <= {"expected an idle decoder, got one that is still streaming"}
    assert tokens(engine.generate(PROMPTS, PARAMS)) == expected


def test_who_reads_its_first_prompt_while_another_begins_is_refused(expected):
    """Reading one may take long; the other decodes undisturbed."""
    engine = decoder(model_of("llama"), None, 0)
    others: list[Any] = []

    def prompts() -> Any:
        others.append(engine.stream(PROMPTS, PARAMS))
        others.append([next(others[0])])
        yield PROMPTS[0]

    with pytest.raises(RuntimeError, match="still streaming"):
        list(engine.stream(prompts(), PARAMS))
    stream, first = others
    assert tokens([*first, *stream]) == expected


def test_a_stream_that_has_nothing_in_the_decoder_stops_nobody(expected):
    engine = decoder(model_of("llama"), "ngram", 2)
    stream = engine.stream(PROMPTS[:1], PARAMS)
    assert next(stream).token_ids == expected[0]
    assert tokens(engine.generate(PROMPTS, PARAMS)) == expected
    stream.close()
    other = engine.stream(PROMPTS, PARAMS)
    next(other)
    with pytest.raises(RuntimeError, match="still streaming"):
        engine.generate(PROMPTS, PARAMS)
    other.close()
    assert engine.is_idle()


def test_two_streams_in_turn_keep_to_their_own_outputs():
    """Also after the first one's last output, when the other has begun."""
    engine = decoder(model_of("llama"), None, 0)
    short, long = (SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (2, 9))
    first = engine.stream(PROMPTS[:1], short)
    assert next(first).index == 0
    second = engine.stream(PROMPTS[1:3], [short, long])
    got = [next(second).index]
    assert list(first) == []
    assert got + [output.index for output in second] == [0, 1]
    assert engine.is_idle()


def test_threads_that_begin_where_others_end_never_get_outputs_of_others():
    engine = decoder(model_of("llama"), "ngram", 2)

    def own(name: int) -> set[str]:
        found = set()
        for turn in range(60):
            ids = [f"{name}-{turn}-{i}" for i in range(2)]
            prompts = [{"token_ids": PROMPTS[i], "id": ids[i]} for i in range(2)]
            try:
                outputs = engine.generate(prompts, SamplingParams(max_new_tokens=2 + name % 2))
            except RuntimeError as error:
                found.add(str(error))
            else:
                found.add("own" if [output.id for output in outputs] == ids else "not own")
        return found

    names = iter(range(8))
    found = set().union(*from_threads(lambda: own(next(names))))
    assert "own" in found
    assert found <= {"own", "expected an idle decoder, got one that is still streaming"}


def test_a_request_cancelled_in_the_middle_of_a_step_costs_no_other_anything(expected):
    """A client of a server goes away, on another thread than the one that steps."""
    engine = decoder(model_of("llama"), "ngram", 2)
    requests = [engine.add(prompt, PARAMS) for prompt in PROMPTS]
    cancelled: list[Any] = []
    leaving = threading.Thread(target=lambda: cancelled.append(engine.cancel(requests[0])))

    def commit(*args: Any) -> None:
        if leaving.ident is None:
            leaving.start()
            leaving.join(0.2)

    engine.drafter.commit = commit
    outputs = {}
    while not engine.is_idle():
        outputs |= {p.request: p.output.token_ids for p in engine.step() if p.output is not None}
        if leaving.ident is not None:
            leaving.join()
    assert [outputs[request] for request in requests[1:]] == expected[1:]
    (output,) = cancelled
    assert requests[0] not in outputs and output.finish_reason == "cancelled"
    assert output.token_ids == expected[0][: len(output.token_ids)]


def test_what_is_added_while_another_thread_cancels_is_decoded():
    engine = decoder(model_of("llama"), None, 0)
    short = SamplingParams(max_new_tokens=1)
    kept: list[Any] = [engine.add(PROMPTS[0], short) for _ in range(500)]

    def clients() -> None:
        for _ in range(200):
            kept.append(engine.add(PROMPTS[0], short))
            engine.cancel(engine.add(PROMPTS[1], short))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        from_threads(clients)
    finally:
        sys.setswitchinterval(interval)
    ended = set()
    while not engine.is_idle():
        ended |= {progress.request for progress in engine.step()}
    assert ended == set(kept)

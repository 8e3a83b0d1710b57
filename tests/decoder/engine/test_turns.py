"""Two callers of one decoder: the second is refused, whatever threads they are on."""

from __future__ import annotations

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

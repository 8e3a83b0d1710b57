"""Stop strings are found in the text with special tokens, which the output's text leaves out."""

from __future__ import annotations

from typing import Any

import pytest

from decoder.requests.params import SamplingParams
from decoder.requests.reader import Request
from decoder.requests.sequence import ActiveSequence

SPELLING = ["a", "b", "cd", "<|end|>", "\n"]
SPECIAL = 3


class Words:
    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(SPELLING[i] for i in ids if i != SPECIAL or not skip_special_tokens)


@pytest.mark.parametrize(
    ("stop", "emitted", "taken", "text"),
    [
        ("<|end|>", [0, SPECIAL, 1], 2, "a"),
        ("<|end|>\n", [0, SPECIAL, 1, SPECIAL, 4, 0], 5, "ab"),
        ("d<|end|>", [2, SPECIAL, 0], 2, "c"),
        ("end", [0, 0, SPECIAL], 3, "aa"),
        ("b", [SPECIAL, 0, 2, 1, 0], 4, "acd"),
        ("bc", [SPECIAL, 1, 2, 1], 3, ""),
        ("cd", [0, 2, 1], 2, "a"),
        ("ab", [0, SPECIAL, 1], None, "ab"),  # transformers sees what stands between them too
        ("<|other|>", [0, SPECIAL, 1], None, "ab"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_stop_strings(stop, emitted, taken, text, chunk):
    params = SamplingParams(max_new_tokens=20, stop=stop)
    request = Request(0, None, None, [0], params, frozenset(), 20)
    sequence = ActiveSequence(request, 0, Words())
    for start in range(0, len(emitted), chunk):
        if sequence.finish_reason is None:
            sequence.extend(emitted[start : start + chunk], 0)
    assert sequence.finish_reason == (None if taken is None else "stop")
    assert sequence.token_ids == emitted[:taken]
    assert sequence.output().text == text


def test_the_text_ends_before_an_end_of_sequence_that_is_not_called_special():
    request = Request(0, None, None, [0], SamplingParams(), frozenset({2}), 20)
    sequence = ActiveSequence(request, 0, Words())
    sequence.extend([0, 1, 2, 1], 0)
    assert (sequence.finish_reason, sequence.token_ids) == ("eos", [0, 1, 2])
    assert sequence.output().text == "ab"


def test_an_error_is_one_line_that_no_terminal_obeys() -> None:
    request = Request(4, None, None, [0], SamplingParams(), frozenset(), 20)
    sequence = ActiveSequence(request, 0, None)
    sequence.fail("one\n two \x1b[31m")
    assert sequence.output().error == "prompt 4: one two \\x1b[31m"

"""Stopping criteria and streamers get what transformers gives them, call for call."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.generation import batch, method, target
from support.tiny import MOE_VOCAB, save_tokenizer
from torch import Tensor
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from decoder.errors import UserError

torch.set_num_threads(1)
ENDS = [9, 30, 31, 32]


class Recorded(StoppingCriteria):
    """Ends a row at the tokens of its own, or the batch after some calls; notes every call."""

    def __init__(self, ends: tuple[int, ...] = (), calls: int | None = None) -> None:
        self.ends, self.calls, self.seen = ends, calls, []  # type: ignore[var-annotated]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append((input_ids.tolist(), scores))
        if self.calls is not None and len(self.seen) >= self.calls:
            return torch.ones(len(input_ids), dtype=torch.bool)
        return torch.isin(input_ids[:, -1], torch.tensor(self.ends or (-1,)))


class Tokens(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


@pytest.mark.parametrize("eos", [None, ENDS], ids=["no eos", "eos"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: [Recorded()],
        lambda: [Recorded(ends=(30, 42, 53))],
        lambda: [Recorded(calls=4)],
        lambda: [Recorded(ends=(70,)), Recorded(ends=(30,)), MaxLengthCriteria(15)],
        lambda: [MaxLengthCriteria(4)],
        lambda: [EosTokenCriteria([53, 70])],
        lambda: [EosTokenCriteria([53, 70]), Recorded(calls=5)],
    ],
    ids=range(7),
)
@pytest.mark.parametrize("drafter", ["ngram", "draft model"])
def test_criteria_and_streamer_are_called_as_by_transformers(
    drafter: str, make: Any, eos: Any
) -> None:
    results = []
    for custom in (None, method("llama", drafter)):
        criteria, streamer = make(), Tokens()
        returned = target("llama").generate(
            **batch(), max_new_tokens=10, do_sample=False, eos_token_id=eos, pad_token_id=0,
            stopping_criteria=StoppingCriteriaList(criteria), streamer=streamer,
            custom_generate=custom,
        )  # fmt: skip
        seen = [criterion.seen for criterion in criteria if isinstance(criterion, Recorded)]
        results.append((returned.tolist(), seen, streamer.got))
    assert results[1] == results[0]


def test_stop_strings_as_a_criterion(tmp_path: Path) -> None:
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(MOE_VOCAB - 1)]
    words[1] = "abcdef"  # which transformers tells a tokenizer's way with spaces by
    save_tokenizer(tmp_path, words)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    asked = {**batch(), "max_new_tokens": 12, "do_sample": False, "eos_token_id": ENDS}
    plain = target("llama").generate(**asked)
    word = tokenizer.convert_ids_to_tokens(int(plain[0, 12]))
    for stop in ([word], [word[1:], "zz"]):
        criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, stop)])
        expected = target("llama").generate(**asked, stopping_criteria=criteria)
        ours = target("llama").generate(
            **asked, stopping_criteria=criteria, custom_generate=method("llama", "ngram")
        )
        assert torch.equal(ours, expected)
        assert not torch.equal(ours, plain)


def test_time_ends_the_batch() -> None:
    class Slow(Recorded):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            time.sleep(0.05)
            return super().__call__(input_ids, scores)

    slow = Slow()
    returned = target("llama").generate(
        **batch(), max_new_tokens=100, eos_token_id=None, max_time=0.4,
        stopping_criteria=StoppingCriteriaList([slow]), custom_generate=method("llama", "ngram"),
    )  # fmt: skip
    assert returned.shape[1] - batch()["input_ids"].shape[1] == len(slow.seen) < 20


def test_a_streamer_that_fails_leaves_the_method_usable() -> None:
    class Broken(Tokens):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.got) == 3:
                raise ConnectionError("nobody listens")

    asked = {**batch(), "max_new_tokens": 8, "custom_generate": method("llama", "ngram")}
    with pytest.raises(ConnectionError, match="nobody listens"):
        target("llama").generate(**asked, streamer=Broken())
    streamer = Tokens()
    returned = target("llama").generate(**asked, streamer=streamer)
    assert streamer.got[-1] == "end"
    assert [list(step) for step in zip(*streamer.got[1:-1], strict=True)] == [
        row[-len(streamer.got) + 2 :] for row in returned.tolist()
    ]


def test_an_end_without_padding_is_refused() -> None:
    model = target("llama")
    with pytest.raises(UserError, match="pad_token_id"):
        model.generate(
            **batch(), max_new_tokens=8, eos_token_id=None, pad_token_id=None,
            stopping_criteria=StoppingCriteriaList([EosTokenCriteria(ENDS)]),
            custom_generate=method("llama", "ngram"),
        )  # fmt: skip

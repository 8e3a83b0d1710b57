"""Which logits processors are taken, and which of them the sampler does itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.generation import batch, method, target
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkingConfig,
)

from decoder.errors import UserError
from decoder.requests.reader import Request

torch.set_num_threads(1)
PLAIN = {"max_new_tokens": 10, "do_sample": False}


class Parity(LogitsProcessor):
    """Raises every second token by how often the row has said it; a function of the prefix."""

    is_prefix_function = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.zeros_like(scores).scatter_add_(
            1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype)
        )
        scores[:, ::2] += 3 * counts[:, 1::2].sum(dim=1, keepdim=True) - 4  # in place, as some do
        return scores


class Counting(LogitsProcessor):
    """Knows how often it was called: no function of the prefix."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores.roll(self.calls)


class Derived(SuppressTokensLogitsProcessor):
    """What a class derived from a known one does is not known."""


def marked(input_ids: Tensor, scores: Tensor) -> Tensor:
    return scores.roll(int(input_ids.shape[1]) % 3)


def unmarked(input_ids: Tensor, scores: Tensor) -> Tensor:
    return scores


def asked(processor: Any) -> dict[str, Any]:
    return {**batch(), **PLAIN, "logits_processor": LogitsProcessorList([processor])}


marked.is_prefix_function = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("drafter", ["ngram", "draft model"])
@pytest.mark.parametrize("processor", [Parity(), marked, SuppressTokensLogitsProcessor([70, 71])])
def test_functions_of_the_prefix_are_taken(processor: Any, drafter: str) -> None:
    expected = target("llama").generate(**asked(processor))
    ours = target("llama").generate(**asked(processor), custom_generate=method("llama", drafter))
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, target("llama").generate(**batch(), **PLAIN))


@pytest.mark.parametrize("processor", [Counting(), Derived([70]), unmarked])
def test_what_may_keep_state_is_refused_by_name(processor: Any) -> None:
    name = getattr(processor, "__name__", type(processor).__name__)
    with pytest.raises(UserError, match=rf"logits_processor .*expected {name} to have is_prefix"):
        target("llama").generate(**asked(processor), custom_generate=method("llama", "ngram"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", 1.5),
        ("watermarking_config", SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2])),
    ],
)
def test_an_argument_for_a_stateful_class_is_named(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} is not supported"):
        target("llama").generate(
            **batch(), **PLAIN, **{name: value}, custom_generate=method("llama", "ngram")
        )


@pytest.mark.parametrize(
    ("options", "by_sampler"),
    [
        ({}, True),
        ({"repetition_penalty": 1.2, "min_new_tokens": 3, "eos_token_id": [5, 9]}, True),
        ({"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1}, True),
        ({"do_sample": True, "top_p": 0.0}, False),  # no value of the sampler's
        ({"suppress_tokens": [3]}, False),
    ],
)
def test_the_sampler_does_what_it_can(
    options: dict[str, Any], by_sampler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody pays for processors who asks for what the sampler has."""
    given: list[Any] = []
    decoder = method("llama", "ngram")
    target("llama").generate(**batch(), **PLAIN, custom_generate=decoder)  # has one of three rows
    add = decoder._decoder.add

    def noted(request: Request) -> Request:
        given.append(request.process)
        return add(request)

    monkeypatch.setattr(decoder._decoder, "add", noted)
    # Unpadded: padding counts for repetition in some versions of transformers.
    rows = {"input_ids": batch()["input_ids"][:1], "attention_mask": batch()["attention_mask"][:1]}
    target("llama").generate(**rows, **PLAIN | options, custom_generate=decoder)
    assert len(given) == 1 and (given[0] is None) == by_sampler

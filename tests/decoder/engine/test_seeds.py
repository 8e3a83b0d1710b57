"""Sampled output is a function of the request and its seed, whatever else is decoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.decoding import decoder
from support.tiny import perturbed, ragged_prompts, tiny_moe

from decoder import SamplingParams
from decoder.drafters import NgramDrafter

torch.set_num_threads(1)

TARGET = tiny_moe()
DRAFT = perturbed(TARGET, 3, 0.05)
PROMPTS = [2 * prompt for prompt in ragged_prompts(6, seed=7)]
NEW = 12


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def params(seed: int | None = None, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0.6, max_new_tokens=NEW, seed=seed, **changes)


@pytest.mark.parametrize("drafter", ["ngram", "suffix", "self", "model"])
@pytest.mark.parametrize("verifier", ["standard", "block", "coupled"])
def test_draws_depend_on_the_request_alone(verifier: str, drafter: str) -> None:
    """Alone, with neighbours of every kind, after others in the same row."""
    made = {"model": DRAFT, "ngram": NgramDrafter(3, 1)}.get(drafter, drafter)
    engine = decoder(TARGET, made, 3, verifier=verifier, max_batch_size=3)
    mixed = [
        params(0),
        params(1, top_p=0.8, ignore_eos=True),
        SamplingParams(max_new_tokens=5),  # greedy
        params(3, presence_penalty=0.5, min_new_tokens=4),
        params(4, top_k=10).updated({"max_new_tokens": 2}),  # hardly drafts
        params(5, ignore_eos=True),
    ]
    alone = [
        engine.generate([p], [own])[0].token_ids for p, own in zip(PROMPTS, mixed, strict=True)
    ]
    assert tokens(engine.generate(PROMPTS, mixed)) == alone
    assert engine.stats.drafted > 0
    order = [5, 2, 4, 0, 3, 1]
    turned = engine.generate([PROMPTS[i] for i in order], [mixed[i] for i in order])
    assert tokens(turned) == [alone[i] for i in order]


def test_requests_without_a_seed_differ_and_report_theirs() -> None:
    engine = decoder(TARGET, DRAFT, 3)
    torch.manual_seed(5)
    first = engine.generate([PROMPTS[1]] * 3, params(ignore_eos=True))
    assert len({tuple(output.token_ids) for output in first}) == 3
    again = engine.generate([{"token_ids": PROMPTS[1], "seed": o.seed} for o in first],
                            params(ignore_eos=True))  # fmt: skip
    assert tokens(again) == tokens(first) and [o.seed for o in again] == [o.seed for o in first]
    torch.manual_seed(5)
    assert tokens(engine.generate([PROMPTS[1]] * 3, params(ignore_eos=True))) == tokens(first)
    (given,) = engine.generate(PROMPTS[:1], params(17))
    (greedy,) = engine.generate(PROMPTS[:1], SamplingParams(seed=17, max_new_tokens=2))
    assert (given.seed, greedy.seed) == (17, None)

"""Hybrids decode to transformers' own tokens, whatever drafts for them and shares their batch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.decoding import decoder
from support.families import build
from support.tiny import perturbed, random_prompts

from decoder import SamplingParams
from decoder.drafters.independent import IndependentDrafter
from decoder.drafters.ngram import NgramDrafter
from decoder.drafters.self_draft import SelfDrafter

NEW_TOKENS = 9
PROMPTS = random_prompts(9, seed=3, high=7)


@functools.cache
def model_of(name: str) -> Any:
    return build(name)


@functools.cache
def own(name: str) -> list[list[int]]:
    """What transformers' ``generate`` makes of each prompt."""
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS}
        whole = model_of(name).generate(ids, **asked, do_sample=False)[0]
        outputs.append(whole[len(prompt) :].tolist())
    return outputs


def drafter_of(kind: str, name: str) -> Any:
    if kind == "independent":
        return IndependentDrafter(perturbed(model_of(name)))
    return {"ngram": NgramDrafter, "self": SelfDrafter, "none": lambda: None}[kind]()


@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("kind", ["ngram", "independent", "self"])
def test_a_hybrid_decodes_to_its_own_tokens(kind: str, batch: int) -> None:
    name, gamma = "Qwen3NextForCausalLM", (batch - 1) % 7
    made = decoder(model_of(name), drafter_of(kind, name), gamma, max_batch_size=batch)
    outputs = made.generate(PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS))
    assert [o.token_ids for o in outputs] == own(name)

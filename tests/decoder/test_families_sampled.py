"""Every drafter under sampling: with coupled noise the output is the target's own for the seed.

Standard and block verification are tested by their law elsewhere; here each drafter's tokens and
probabilities go through them once, so that shapes and dtypes of every draft are exercised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoding import (
    NEW_TOKENS,
    PROMPTS,
    decoder_of,
    draft_of,
    model_of,
    recordings,
    references,
)
from support.eagle_reference import LAYER, H, norm, random_layer, save
from support.scripted import GammaSchedule

from decoder import SamplingParams
from decoder.drafters import HybridDrafter, NgramDrafter, ReplayDrafter, SelfDrafter, SuffixDrafter
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.independent import IndependentDrafter

torch.set_num_threads(1)

FAMILY = "qwen3_moe"
PARAMS = [
    SamplingParams(temperature=0.9, seed=1, max_new_tokens=16),
    SamplingParams(temperature=1.3, top_k=8, top_p=0.9, seed=2, max_new_tokens=14),
    SamplingParams(temperature=0.0, max_new_tokens=16),
    SamplingParams(temperature=0.8, repetition_penalty=1.4, seed=3, max_new_tokens=16),
    SamplingParams(
        temperature=1.0, presence_penalty=0.7, frequency_penalty=0.4, seed=4, max_new_tokens=15
    ),
    SamplingParams(temperature=0.7, min_p=0.1, logit_bias={5: 2.0}, seed=5, max_new_tokens=16),
]


def eagle(path: Path, kind: str) -> EagleDrafter:
    """A random head; EAGLE-3 reads both ends and the middle of a two-layer target."""
    if kind == "eagle1":
        tensors = random_layer("layers.0", H, 0)
        tensors["fc.weight"] = torch.randn(H, 2 * H) / H**0.5
        return EagleDrafter(save(path, LAYER, tensors))
    tensors = random_layer("midlayer", 2 * H, 0) | {
        "midlayer.hidden_norm.weight": norm(H, 1),
        "midlayer.input_layernorm.weight": norm(H, 2),
        "norm.weight": norm(H, 3),
        "fc.weight": torch.randn(H, 3 * H) / H**0.5,
        "lm_head.weight": torch.randn(20, H) / H**0.5,
        "d2t": 3 * torch.arange(20) - torch.arange(20),
    }
    config = {**LAYER, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    return EagleDrafter(save(path, config, tensors))


def make(name: str, path: Path) -> Any:
    match name:
        case "independent":
            return draft_of(FAMILY)
        case "hybrid":
            return HybridDrafter(IndependentDrafter(draft_of(FAMILY)), threshold=2)
        case "ngram":
            return NgramDrafter(3, 1)
        case "suffix":
            return SuffixDrafter()
        case "self":
            return SelfDrafter(2)
        case "replay+cost":
            cost = IndependentDrafter(draft_of(FAMILY))
            return ReplayDrafter(0.5, recordings(FAMILY), cost=cost)
    return eagle(path, name)


DRAFTERS = ["independent", "hybrid", "ngram", "suffix", "self", "replay+cost", "eagle1", "eagle3"]


def sampled(drafter: Any, gamma: Any, verifier: str) -> tuple[list[list[int]], Any]:
    decoder = decoder_of(FAMILY, drafter, gamma, verifier=verifier)
    outputs = decoder.generate(PROMPTS, PARAMS)
    return [list(output.token_ids) for output in outputs], decoder


@pytest.fixture(scope="module")
def autoregressive() -> list[list[int]]:
    return sampled(None, 0, "coupled")[0]


@pytest.mark.parametrize("name", DRAFTERS)
def test_coupled_output_is_the_targets_own(
    name: str, tmp_path: Path, autoregressive: list[list[int]]
) -> None:
    tokens, decoder = sampled(make(name, tmp_path), GammaSchedule([3, 5, 0, 1]), "coupled")
    assert tokens == autoregressive
    assert decoder.stats.drafted > 0


@pytest.mark.parametrize("verifier", ["standard", "block"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_other_verifiers_take_every_draft(
    name: str, verifier: str, tmp_path: Path, autoregressive: list[list[int]]
) -> None:
    tokens, _ = sampled(make(name, tmp_path), GammaSchedule([2, 4]), verifier)
    assert [len(row) for row in tokens] == [len(row) for row in autoregressive]
    assert tokens[2] == autoregressive[2]  # the greedy row of a mixed batch


@pytest.mark.parametrize("params", PARAMS[3:5], ids=["repetition", "presence"])
def test_own_model_as_draft_is_always_accepted(params: SamplingParams) -> None:
    """With the target as its own draft, q equals p, penalties over drafted tokens included."""
    decoder = decoder_of(FAMILY, model_of(FAMILY), 4, verifier="standard")
    decoder.generate(PROMPTS, params)
    assert decoder.stats.drafted > 0
    assert decoder.stats.accepted == decoder.stats.drafted


def test_eagle3_draft_distribution_covers_its_own_vocabulary_only(tmp_path: Path) -> None:
    drafter = eagle(tmp_path, "eagle3")
    seen = []
    inner = drafter.propose
    drafter.propose = lambda state, gamma: seen.append(inner(state, gamma)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    sampled(drafter, 3, "standard")
    known = 3 * torch.arange(20)
    for draft in seen:
        assert draft.probs is not None
        assert torch.isin(draft.tokens, known).all()
        off = draft.probs.clone()
        off[..., known] = 0
        assert off.abs().max() == 0
        torch.testing.assert_close(
            draft.probs.sum(-1), torch.ones_like(draft.probs[..., 0]), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "opt"])
def test_eagle_on_other_families(family: str, tmp_path: Path) -> None:
    """Features of every family reach the head, and its proposals change nothing greedy."""
    for kind in ("eagle1", "eagle3"):
        head = eagle(tmp_path / kind, kind)
        decoder = decoder_of(family, head, GammaSchedule([2, 0, 3]))
        outputs = decoder.generate(PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS))
        assert [list(output.token_ids) for output in outputs] == references(family)

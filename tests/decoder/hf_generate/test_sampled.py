"""Sampled ``generate(custom_generate=...)`` draws from what ``generate`` draws from."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from support.generation import batch, draft, left_padded, method, target
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper

from decoder.hf_generate import speculative
from decoder.sampling import Sampler

torch.set_num_threads(1)

WARPERS: list[dict[str, Any]] = [
    {"top_k": 0},
    {},  # transformers' default of the 50 most probable
    {"temperature": 0.4, "top_k": 7},
    {"temperature": 2.5, "top_k": 0, "top_p": 0.7},
    {"top_k": 9, "top_p": 0.6, "min_p": 0.2, "temperature": 1.4},
    {"top_k": 400, "min_p": 0.5},
    {"top_k": 0, "typical_p": 0.5},
    {"top_k": 20, "top_p": 0.9, "typical_p": 0.8, "epsilon_cutoff": 0.02},
    {"top_k": 0, "eta_cutoff": 0.3},
    {"top_k": 0, "temperature": 0.7, "top_h": 0.3},
    {"top_k": 0, "repetition_penalty": 1.8},
    {"top_k": 5, "no_repeat_ngram_size": 1, "repetition_penalty": 0.5, "renormalize_logits": True},
    {"top_k": 0, "min_new_tokens": 3, "eos_token_id": [5, 30, 31, 72]},
    {"sequence_bias": {(30,): 3.0}, "top_p": 0.8, "watermarking_config": {"bias": 2.0}},
    # One's own, which come before those of the arguments: not the sampler's order.
    {"top_k": 12, "logits_processor": LogitsProcessorList([MinPLogitsWarper(0.1)])},
    {"temperature": 3.0, "logits_processor": LogitsProcessorList([TopKLogitsWarper(4, -2.0)])},
]


@pytest.mark.parametrize("options", WARPERS, ids=[",".join(options) for options in WARPERS])
def test_the_first_token_is_drawn_from_what_generate_draws_from(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    original = Sampler.draw

    def noted(self: Sampler, probs: Any, rows: Tensor, positions: Tensor) -> Tensor:
        drawn.append(probs.probs[:, 0])
        return original(self, probs, rows, positions)

    monkeypatch.setattr(Sampler, "draw", noted)
    asked = {**batch(), "max_new_tokens": 1, "do_sample": True, **options}
    theirs = target("llama").generate(**asked, return_dict_in_generate=True, output_scores=True)
    target("llama").generate(**asked, custom_generate=method("llama", "ngram"))
    expected = theirs.scores[0].double().softmax(dim=-1)
    torch.testing.assert_close(drawn[0].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(drawn[0] > 0, expected > 0)


def test_the_seed_of_torch_decides_and_rows_differ() -> None:
    asked = {**batch(1), "max_new_tokens": 12, "do_sample": True, "num_return_sequences": 4}

    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return target("llama").generate(**asked, custom_generate=method("llama", "ngram")).tolist()

    first = drawn(1)
    assert drawn(1) == first != drawn(2)
    assert len({tuple(row) for row in first}) == 4


# What the test below allows: few outcomes, so that each is drawn often.
ALLOWED = [11, 30, 42, 49, 70]
COUNT, ROWS, TURNS = 3, 100, 15


def allowed(row: int, ids: Tensor) -> list[int]:
    return ALLOWED


def exact_law(asked: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Probability of every output, from transformers' own processed scores of each prefix."""
    law = {}
    prompt = asked["input_ids"][0].tolist()
    rest = {name: value for name, value in asked.items() if name not in left_padded([[6]])}
    tables = {}
    for length in range(COUNT):
        for prefix in itertools.product(ALLOWED, repeat=length):
            out = target("llama").generate(
                torch.tensor([prompt + list(prefix)]),
                **rest | {"max_new_tokens": 1},
                return_dict_in_generate=True,
                output_scores=True,
            )
            tables[prefix] = out.scores[0][0].double().softmax(dim=-1)
    for output in itertools.product(ALLOWED, repeat=COUNT):
        steps = [float(tables[output[:i]][token]) for i, token in enumerate(output)]
        law[output] = steps[0] * steps[1] * steps[2]
    return law


@pytest.mark.parametrize("verifier", ["standard", "block"])
def test_outputs_have_the_law_of_the_processed_target(verifier: Any) -> None:
    asked = {
        **left_padded([[12, 53, 25, 74]]), "do_sample": True, "top_k": 0, "temperature": 1.5,
        "prefix_allowed_tokens_fn": allowed, "no_repeat_ngram_size": 2, "eos_token_id": None,
        "repetition_penalty": 1.2, "max_new_tokens": COUNT,
    }  # fmt: skip
    law = exact_law(asked)
    assert abs(sum(law.values()) - 1) < 1e-9
    ours = speculative(draft("llama"), 2, kernels=False, verifier=verifier)
    counts = dict.fromkeys(law, 0)
    torch.manual_seed(0)
    for _ in range(TURNS):
        returned = target("llama").generate(
            **asked, num_return_sequences=ROWS, custom_generate=ours
        )
        for row in returned[:, -COUNT:].tolist():
            counts[tuple(row)] += 1
    assert not any(counts[output] for output, chance in law.items() if chance == 0)
    # Rare outcomes together: the test needs some of each.
    usual = [output for output, chance in law.items() if chance * ROWS * TURNS >= 5]
    seen = [counts[output] for output in usual]
    expected = [law[output] * ROWS * TURNS for output in usual]
    seen.append(ROWS * TURNS - sum(seen))
    expected.append(ROWS * TURNS - sum(expected))
    assert len(usual) > 20
    assert chisquare(seen, expected).pvalue > 1e-3

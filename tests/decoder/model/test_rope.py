"""Rotary embeddings that go by length: a row's output is its own, whatever else is in the batch."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from support.decoding import decoder
from support.device.fake_graphs import fake_graphs
from support.tiny import VOCAB, perturbed, randomize

from decoder import SamplingParams
from decoder.model.runner import ModelRunner

ORIGINAL, NEW_TOKENS = 32, 10
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LONGROPE}),
    "phi3": (
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    ),
    "phimoe": (
        "Phimoe",
        {
            "rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
            "num_local_experts": 4,
        },
    ),
    "dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL}),
}
# Below the original length, above it, and crossing it: after, in and before the first round.
LENGTHS = (8, 41, 25, 3, 30, 33)
RECOMPUTES = {"phi3", "phimoe"}  # transformers drops their cache at the crossing


@functools.cache
def model_of(case: str) -> Any:
    name, changes = CASES[case]
    config = getattr(transformers, f"{name}Config")(**CONFIG | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    randomize(model, 0)
    if case == "dynamic":  # its layers keep the config of a short context; rows may be longer
        model.config = copy.deepcopy(config)
        model.config.max_position_embeddings = CONFIG["max_position_embeddings"]
    return model.eval()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def outputs(case: str, drafter: Any, gamma: int, rows: int, **options: Any) -> list[list[int]]:
    options = {"max_batch_size": rows, "max_length": 60} | options
    made = decoder(model_of(case), drafter, gamma, **options)
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    return [list(o.token_ids) for o in made.generate(prompts(), params)]


def own(case: str, prompt: list[int]) -> list[int]:
    model = model_of(case)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]))  # a long call before would be remembered
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", list(CASES))
def test_a_row_is_decoded_as_if_it_were_alone(case: str) -> None:
    alone = outputs(case, None, 0, rows=1)
    assert outputs(case, "ngram", 3, rows=4) == alone
    assert outputs(case, perturbed(model_of(case)), 4, rows=3) == alone
    for prompt, output in zip(prompts(), alone, strict=True):
        crosses = len(prompt) <= ORIGINAL < len(prompt) + NEW_TOKENS
        if not (crosses and case in RECOMPUTES):
            assert output == own(case, prompt), len(prompt)


@pytest.mark.parametrize("case", list(CASES))
def test_logits_of_a_row_do_not_depend_on_a_longer_one(case: str) -> None:
    """Drafts beyond the original length included, which decoding token by token would not see."""
    ids = torch.tensor([prompts()[1][:36]] * 2)
    both, alone = ModelRunner(model_of(case), 2, 64), ModelRunner(model_of(case), 2, 64)
    both.prefill(torch.tensor([0, 1]), ids, torch.tensor([30, 36]))
    alone.prefill(torch.tensor([0]), ids[:1, :30], torch.tensor([30]))
    positions = torch.tensor([[30, 31, 32, 33], [36, 37, 38, 39]])
    together = both.forward(ids[:, :4], torch.tensor([0, 1]), positions).logits[0]
    for column in range(4):
        one = slice(column, column + 1)
        single = alone.forward(ids[:1, one], torch.tensor([0]), positions[:1, one]).logits[0, 0]
        torch.testing.assert_close(together[column], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["llama", "dynamic"])
@pytest.mark.parametrize("length", [20, 60])
def test_no_graph_holds_what_is_chosen_on_the_host(
    case: str, length: int, monkeypatch: Any
) -> None:
    """Also where no row can reach the length at which something changes."""
    monkeypatch.setattr(f"{__name__}.LENGTHS", (8, 3))
    expected = outputs(case, "ngram", 3, rows=2, max_length=length)
    fake_graphs(monkeypatch)
    assert outputs(case, "ngram", 3, rows=2, max_length=length, static=True) == expected


def test_the_model_keeps_its_own_forward() -> None:
    model = model_of("llama")
    outputs("llama", "ngram", 3, rows=2)
    assert not any("forward" in vars(module) for module in model.modules())

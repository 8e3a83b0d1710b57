"""Rounds in graphs: the same tokens as operation by operation, and few operations beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.device.fake_graphs import fake_graphs
from support.eagle_reference import LAYER, H, random_layer, save
from support.tiny import ragged_prompts, tiny_moe

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.independent import IndependentDrafter
from decoder.drafters.self_draft import SelfDrafter
from decoder.sampling.sampler import VERIFIERS

GREEDY = SamplingParams(max_new_tokens=9)
SAMPLED = SamplingParams(max_new_tokens=9, temperature=0.9, seed=3)
PENALISED = SamplingParams(
    max_new_tokens=9, temperature=0.9, seed=5, top_p=0.9, top_k=40, min_p=0.01,
    repetition_penalty=1.3, frequency_penalty=0.2, logit_bias={5: 2.0}, min_new_tokens=4,
)  # fmt: skip


def eagle(folder: Path) -> EagleDrafter:
    weights = {"fc.weight": 0.1 * torch.randn(H, 2 * H), **random_layer("layers.0", H, 2)}
    return EagleDrafter(save(folder, LAYER, weights))


DRAFTERS: dict[str, Any] = {
    "none": lambda _: None,
    "independent": lambda _: IndependentDrafter(tiny_moe(seed=1, layers=1)),
    "eagle": eagle,
    "self": lambda _: SelfDrafter(),
}


def engine_of(name: str, folder: Path, verifier: str = "standard", **options: Any) -> Any:
    torch.manual_seed(0)
    target = tiny_moe()
    target.set_experts_implementation("batched_mm")  # the eager experts look at their tokens
    drafter = DRAFTERS[name](folder)
    if isinstance(drafter, IndependentDrafter):
        drafter.model.set_experts_implementation("batched_mm")
    options = {"max_batch_size": 3, "max_length": 60, "attention": "portable"} | options
    return SpeculativeDecoder(target, drafter, 4, verifier, kernels=False, **options)


def outputs_of(engine: Any, params: list[SamplingParams]) -> list[list[int]]:
    return [list(o.token_ids) for o in engine.generate(ragged_prompts(len(params)), params)]


MIXES = {
    "greedy": [GREEDY] * 5,
    "sampled": [SAMPLED] * 5,
    "mixed": [GREEDY, PENALISED, SAMPLED, SamplingParams(max_new_tokens=3), PENALISED],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", DRAFTERS)
def test_rounds_in_graphs_give_the_same_tokens(monkeypatch, tmp_path, name, mix):
    """Rows end apart and others take their places, so batches of every size are replayed."""
    expected = outputs_of(engine_of(name, tmp_path, static=False), MIXES[mix])
    graphs = fake_graphs(monkeypatch)
    engine = engine_of(name, tmp_path, static=True)
    assert outputs_of(engine, MIXES[mix]) == expected
    captured = len(graphs)
    assert captured > 3
    assert outputs_of(engine, MIXES[mix]) == expected, "now every shape is replayed"
    assert len(graphs) == captured

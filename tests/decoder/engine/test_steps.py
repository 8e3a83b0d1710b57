"""Rounds in graphs: the same tokens as operation by operation, and few operations beside them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device import sampling_ops
from support.device.fake_graphs import fake_graphs
from support.device.operations import OperationLog
from support.eagle_reference import LAYER, H, random_layer, save
from support.tiny import ragged_prompts, tiny_moe

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters.eagle import EagleDrafter
from decoder.drafters.independent import IndependentDrafter
from decoder.drafters.ngram import HybridDrafter, NgramDrafter
from decoder.drafters.replay import ReplayDrafter
from decoder.drafters.self_draft import SelfDrafter
from decoder.drafters.suffix import SuffixDrafter
from decoder.model import kernels

BAD = 96  # a token that a model may have no numbers for
GREEDY = SamplingParams(max_new_tokens=9)
SAMPLED = SamplingParams(max_new_tokens=9, temperature=0.9, seed=3)
PENALISED = SamplingParams(
    max_new_tokens=9, temperature=0.9, seed=5, top_k=40, min_p=0.01,
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
    "ngram": lambda _: NgramDrafter(2, 1),
    "suffix": lambda _: SuffixDrafter(),
    "hybrid": lambda _: HybridDrafter(IndependentDrafter(tiny_moe(seed=1, layers=1)), threshold=1),
    "recording": lambda _: ReplayDrafter(0.7),
}


def engine_of(name: str, folder: Path, verifier: str = "standard", **options: Any) -> Any:
    torch.manual_seed(0)
    target = tiny_moe()
    target.set_experts_implementation("batched_mm")  # the eager experts look at their tokens
    drafter = DRAFTERS[name](folder)
    model = getattr(drafter, "model", None)
    if model is not None:
        getattr(model, "model", model).set_experts_implementation("batched_mm")
    options = {"max_batch_size": 3, "max_length": 60, "attention": "portable"} | options
    return SpeculativeDecoder(target, drafter, 4, verifier, kernels=False, **options)


def outputs_of(engine: Any, params: list[SamplingParams]) -> list[list[int]]:
    return [list(o.token_ids) for o in engine.generate(ragged_prompts(len(params)), params)]


def outcomes_of(engine: Any) -> list[tuple[list[int], str | None]]:
    """Tokens and errors, one of the four rows having no number to go on with after its first."""
    engine.runner.model.get_input_embeddings().weight.data[BAD] = float("nan")
    params = [SAMPLED, SamplingParams(max_new_tokens=9, logit_bias={BAD: 1e4}), SAMPLED, GREEDY]
    outputs = list(engine.stream(ragged_prompts(4), params))
    assert not engine.runner._watch.hooked
    return [(list(o.token_ids), o.error) for o in sorted(outputs, key=lambda o: o.index)]


MIXES = {
    "greedy": [GREEDY] * 5,
    "sampled": [SAMPLED] * 5,
    "mixed": [GREEDY, PENALISED, SAMPLED, SamplingParams(max_new_tokens=3), PENALISED],
}


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("none", "mixed"),
        ("independent", "greedy"),
        ("independent", "sampled"),
        ("independent", "mixed"),
        ("eagle", "greedy"),
        ("eagle", "mixed"),
        ("self", "sampled"),
        ("hybrid", "sampled"),
    ],
)
def test_rounds_in_graphs_give_the_same_tokens(monkeypatch, tmp_path, name, mix):
    """Rows end apart and others take their places, so batches of every size are replayed."""
    expected = outputs_of(engine_of(name, tmp_path, static=False), MIXES[mix])
    graphs = fake_graphs(monkeypatch)
    engine = engine_of(name, tmp_path, static=True)
    assert outputs_of(engine, MIXES[mix]) == expected
    captured = len(graphs)
    assert captured > 3
    assert outputs_of(engine, MIXES[mix]) == expected, "now every shape is replayed"
    assert len(graphs) <= captured + 1, "a draft model's prefill, which it first caught up with"


def test_kernels_need_no_graph_of_their_own_for_other_truncations(monkeypatch, tmp_path):
    """What a row's rules are is in its tables: only whether any row draws at all is in a graph."""
    common = {"max_new_tokens": 24, "temperature": 0.8, "ignore_eos": True}
    plain, truncating = (
        [SamplingParams(seed=row, **(common | rules)) for row, rules in enumerate(mix)]
        for mix in (
            [{}, {}, {}],
            [{"temperature": 0.0}, {"top_k": 9, "top_p": 0.6, "temperature": 1.0}, {"min_p": 0.1}],
        )
    )
    expected = outputs_of(engine_of("independent", tmp_path, "coupled", static=False), truncating)
    graphs = fake_graphs(monkeypatch)
    monkeypatch.setattr(kernels, "sampling_ops", lambda device, dtype: sampling_ops)
    engine, made = engine_of("independent", tmp_path, "coupled", static=True), []
    for mix in (plain, plain, truncating):  # the draft model's prefill comes with the second
        for prompt, params in zip(ragged_prompts(3), mix, strict=True):
            engine.add(prompt, params)
        for _ in range(4):
            engine.step()
        made.append(len(graphs))
        engine.clear()
    assert made[0] > 3 and made[2] == made[1]
    assert outputs_of(engine, truncating) == expected


@pytest.mark.parametrize("name", ["none", "eagle"])
def test_a_row_without_numbers_is_lost_alone(monkeypatch, tmp_path, name):
    options = {"max_batch_size": 4}
    expected = outcomes_of(engine_of(name, tmp_path, static=False, **options))
    assert [error is None for _, error in expected] == [True, False, True, True]
    fake_graphs(monkeypatch)
    engine = engine_of(name, tmp_path, static=True, **options)
    assert outcomes_of(engine) == expected and outcomes_of(engine) == expected


def test_a_round_that_cannot_be_captured_is_run_without_graphs(monkeypatch, tmp_path):
    """Whatever raises in a graph's making, nothing has been changed, and rows go on one by one."""
    expected = outputs_of(engine_of("independent", tmp_path, static=False), MIXES["mixed"])
    fake_graphs(monkeypatch)
    engine = engine_of("independent", tmp_path, static=True)
    steps, left = engine._rounds._verify.steps, {}
    for step, runs in (("_decide", (1, 3)), ("_commit", (1,))):  # every attempt that there is
        method = getattr(steps, step)

        def fails(*args: Any, step: str = step, method: Any = method) -> Any:
            results = method(*args)
            if next(left[step], False):
                raise RuntimeError("in the middle of a warm-up")
            return results

        left[step] = iter([run in runs for run in range(4)])
        monkeypatch.setattr(steps, step, fails)
    assert outputs_of(engine, MIXES["mixed"]) == expected
    assert not any(next(runs, None) for runs in left.values()), "every failure has come"


def operations_of_rounds(engine: Any, params: SamplingParams, graphs: list[Any]) -> list[list[str]]:
    """Of a few rounds of three rows, but for those that are the first of their kind."""
    for prompt in ([7, 8, 9], [5, 6, 7], [11, 12]):
        engine.add(prompt, replace(params, max_new_tokens=45, ignore_eos=True))
    for _ in range(2):  # the prefill, and a round in which a draft model may have to catch up
        engine.step()
    rounds: list[list[str]] = []
    while len(rounds) < 2:
        known = len(graphs)
        with OperationLog() as log:
            engine.step()
        if len(graphs) == known:
            rounds.append(log.names)
    assert len(engine._rounds.batch) == 3
    return rounds


@pytest.mark.parametrize(
    ("name", "verifier"),
    [*((name, "standard") for name in DRAFTERS), ("independent", "block"), ("eagle", "coupled")],
)
def test_few_operations_of_a_round_are_outside_of_graphs(monkeypatch, tmp_path, name, verifier):
    """The arguments of each graph in one copy, and the report; views are counted, too."""
    graphs = fake_graphs(monkeypatch)
    for params in (GREEDY, SAMPLED, PENALISED)[verifier != "standard" :]:
        engine = engine_of(name, tmp_path, verifier, static=True)
        for names in operations_of_rounds(engine, params, graphs):
            assert names.count("tolist") == 1, "the report"
            assert len(names) <= 8, names
            assert names.count("aten._foreach_copy_.default") >= 3

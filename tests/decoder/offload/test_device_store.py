"""Experts in host memory and places on a device, for which a CPU stands in. Not run on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.offload import expert_bytes, saved
from support.tiny import random_prompts

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import build_drafter
from decoder.errors import UserError
from decoder.model import loading
from decoder.offload import Offload, store_of

PROMPTS = random_prompts(4, seed=5)
NEW = SamplingParams(max_new_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("device"), "qwen3_moe", torch.float32)


@pytest.fixture(autouse=True)
def _cpu_stands_in(monkeypatch):
    monkeypatch.setattr(loading, "_require_offloadable", lambda *_: None)


def decoded(model, drafter=None):
    """With transformers' experts, which add up a token's experts in its order, as a GPU's do."""
    decoder = SpeculativeDecoder(
        model, build_drafter(drafter, model), 3 if drafter else 0,
        max_batch_size=3, max_length=40, kernels=False,
    )  # fmt: skip
    return [list(o.token_ids) for o in decoder.generate(PROMPTS, NEW)], decoder.stats.offload


@pytest.mark.parametrize("places", [8, 11, 16])
def test_outputs_are_those_of_the_whole_model(folder, places):
    whole = loading.load_model(folder, device="cpu", experts="batched_mm")
    offload = Offload(places * expert_bytes(folder), host=True)
    model = loading.load_model(folder, device="cpu", experts="batched_mm", offload=offload)
    wanted, _ = decoded(whole)
    for drafter in (None, "ngram", "self"):
        outputs, stats = decoded(model, drafter)
        assert outputs == wanted
        assert stats.bytes_read == stats.missed * expert_bytes(folder)
        assert stats.prefetched == 0


def test_places_hold_the_experts_that_tokens_are_sent_to(folder):
    whole = loading.load_model(folder, device="cpu").model.layers[1].mlp.experts
    offload = Offload(8 * expert_bytes(folder), host=True)
    store = store_of(loading.load_model(folder, device="cpu", offload=offload))
    for ids in map(torch.tensor, ([[3, 5]], [[0, 1], [2, 7]], [[-1, 6], [8, 3]])):
        for layer in (0, 1):
            with store.resident(layer, ids) as places:
                assert torch.equal(places < 0, (ids < 0) | (ids > 7))
                held = {name: pool[places[places >= 0]] for name, pool in store.weights[1].items()}
        for name, experts in held.items():
            assert torch.equal(experts, getattr(whole, name)[ids[places >= 0]])


def test_an_interrupted_copy_loses_no_place(folder, monkeypatch):
    offload = Offload(8 * expert_bytes(folder), host=True)
    store = store_of(loading.load_model(folder, device="cpu", offload=offload))
    copy, calls = torch.Tensor.copy_, iter(range(100))

    def interrupted(self, *args, **kwargs):
        if next(calls) in (3, 8, 9):
            raise KeyboardInterrupt
        return copy(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), store.resident(0, torch.arange(8)):
            pass
    for layer in (1, 0):
        with store.resident(layer, torch.arange(8)) as places:
            assert sorted(places.tolist()) == list(range(8))


def test_what_is_not_copied_is_refused(tmp_path):
    saved(tmp_path, "gpt_oss", torch.float32)
    with pytest.raises(UserError, match="has biases"):
        loading.load_model(tmp_path, device="cpu", offload=Offload(10**9, host=True))


def test_no_graph_is_made_of_what_happens_on_the_host(folder):
    offload = Offload(8 * expert_bytes(folder), host=True)
    model = loading.load_model(folder, device="cpu", offload=offload)
    decoder = SpeculativeDecoder(model, static=True, max_batch_size=2, max_length=20)
    assert decoder.runner.graphs is None


def test_devices_and_where_experts_wait_go_together(folder, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match="in host memory for a GPU, got device 'cpu'"):
        loading.load_model(folder, device="cpu", offload=Offload(10**9, host=True))

"""A model in use by a decoder can be run by others: by another thread, and between two rounds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import greedy_reference, random_prompts, tiny_model

from decoder import SpeculativeDecoder
from decoder.drafters import SelfDrafter
from decoder.model.attention import NAME
from decoder.model.runner import ModelRunner

# Sinks and windows behind an eager attention; windows behind SDPA.
ATTENTION = {"gpt_oss": "eager", "mistral": "sdpa", "gemma2": "eager"}
IDS = torch.tensor([random_prompts(1, low=12)[0]])


@pytest.fixture(scope="module", params=ATTENTION)
def model(request):
    return tiny_model(request.param, attn_implementation=ATTENTION[request.param])


def within(
    model: Any, run: Callable[[], Any], act: Callable[[], Any], crossing: bool = False
) -> tuple[Any, Any]:
    """``act()``, begun here in the middle of another thread's ``run()``; both results.

    It ends before the other goes on, or, ``crossing``, after the other has ended.
    """
    entered, leave, results = threading.Event(), threading.Event(), []

    def pause(*_: Any) -> None:
        if threading.current_thread() is thread:
            entered.set()
            assert leave.wait(60)
        elif crossing:
            leave.set()
            thread.join(60)

    def work() -> None:
        results.append(run())

    # Not in the first layer: masks are made before it, and attention runs on both sides.
    handle = model.model.layers[1].register_forward_pre_hook(pause)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert entered.wait(60)
        done = act()
    finally:
        leave.set()
        thread.join(60)
        handle.remove()
    return results[0], done


@torch.no_grad()
def plain(model):
    return model(IDS, use_cache=False).logits


def forward(runner):
    positions = torch.arange(IDS.shape[1])[None]
    return runner.forward(IDS, torch.zeros(1, dtype=torch.long), positions).logits


def test_a_plain_forward_beside_a_decoding_thread(model):
    runner, expected = ModelRunner(model, 2, 64, attention="portable"), plain(model)
    ragged = forward(runner)
    decoded, beside = within(model, lambda: forward(runner), lambda: plain(model))
    assert torch.equal(beside, expected)
    assert torch.equal(decoded, ragged)


def test_a_decoding_thread_beside_a_plain_forward(model):
    runner, expected = ModelRunner(model, 2, 64, attention="portable"), plain(model)
    ragged = forward(runner)
    beside, decoded = within(model, lambda: plain(model), lambda: forward(runner))
    assert torch.equal(beside, expected)
    assert torch.equal(decoded, ragged)


@pytest.mark.parametrize("crossing", [False, True])
def test_two_decoders_of_one_model(model, crossing):
    runners = [ModelRunner(model, 2, 64, attention="portable") for _ in range(2)]
    expected = forward(runners[0])
    both = within(model, lambda: forward(runners[0]), lambda: forward(runners[1]), crossing)
    assert torch.equal(both[0], expected) and torch.equal(both[1], expected)


def test_the_config_says_the_same_throughout(model):
    name = model.config._attn_implementation
    runner = ModelRunner(model, 2, 64, attention="portable")
    _, seen = within(model, lambda: forward(runner), lambda: model.config._attn_implementation)
    assert seen == name != NAME
    assert NAME not in str(model.config.to_dict())


def test_a_self_drafter_reduces_only_its_own_threads_routing():
    model = tiny_model("qwen3_moe")
    decoder = SpeculativeDecoder(model, SelfDrafter(1), 3, kernels=False, max_batch_size=2)
    prompt = random_prompts(1, low=9)[0]
    expected, whole = plain(model), decoder.generate([prompt])[0].token_ids
    reduced = decoder.drafter._reduced

    def draft():
        with reduced():
            return plain(model)

    drafted, beside = within(model, draft, lambda: plain(model))
    assert torch.equal(beside, expected) and not torch.equal(drafted, expected)
    assert decoder.generate([prompt])[0].token_ids == whole


def test_the_model_can_be_run_between_two_rounds():
    model = tiny_model("gpt_oss")
    decoder = SpeculativeDecoder(model, gamma=0, kernels=False, max_batch_size=2)
    prompts = random_prompts(5, low=3, high=9)
    before, seen = plain(model), []

    def on_output(output):
        seen.append(torch.equal(plain(model), before))
        seen.append(model.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] > IDS.shape[1])

    outputs = decoder.generate(prompts, on_output=on_output)
    assert all(seen) and len(seen) == 10
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == greedy_reference(model, prompt, len(output.token_ids))


def test_hooks_do_not_outlive_their_round():
    model = tiny_model("qwen3_moe")
    count = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    before, outputs = count(), []
    for _ in range(3):
        decoder = SpeculativeDecoder(model, SelfDrafter(1), 3, kernels=False, max_batch_size=2)
        outputs.append([o.token_ids for o in decoder.generate(random_prompts(3))])
        assert count() == before
    assert outputs[0] == outputs[1] == outputs[2]
    with pytest.raises(ValueError, match="top_k must be below"):
        SpeculativeDecoder(model, SelfDrafter(100), 3, kernels=False)
    assert count() == before

"""The target drafting for itself: routing arithmetic, shared cache, families it works on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.decoding import decoder
from support.scripted import GreedySampler, Script
from support.tiny import VOCAB, random_prompts, tiny_model

from decoder.drafters.self_draft import SelfDrafter, find_experts, reduce_top_k
from decoder.errors import UserError
from decoder.model.cache import cache_argument
from decoder.model.runner import ModelRunner

torch.set_num_threads(1)

MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss",
       "phimoe", "granitemoe"]  # fmt: skip


def test_reduce_top_k_keeps_the_heaviest_and_the_sum() -> None:
    index = torch.tensor([[7, 3, 5], [0, 2, 4]])
    weights = torch.tensor([[0.2, 0.5, 0.1], [0.0, 0.0, 0.0]])
    kept, scaled = reduce_top_k(index, weights, 2)
    assert kept[0].tolist() == [3, 7]
    torch.testing.assert_close(scaled[0], torch.tensor([0.5, 0.2]) * (0.8 / 0.7))
    assert scaled[1].tolist() == [0.0, 0.0]


def bound(model: Any, top_k: int | None = 1) -> tuple[SelfDrafter, ModelRunner]:
    runner = ModelRunner(model, 4, 200)
    drafter = SelfDrafter(top_k)
    drafter.bind(runner, GreedySampler(VOCAB), 5)  # type: ignore[arg-type]
    return drafter, runner


@torch.no_grad()
def reduced_continuation(model: Any, prompt: list[int], top_k: int, count: int) -> list[int]:
    """Full routing up to the prompt's last token, ``top_k`` from there on; own hooks and cache."""
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    state = {cache_argument(model): cache, "use_cache": True}
    if len(prompt) > 1:
        model(torch.tensor([prompt[:-1]]), **state)

    def shrink(module: Any, args: Any, kwargs: Any) -> Any:
        hidden, index, weights = (*args, *kwargs.values())
        order = weights.argsort(dim=-1, descending=True)[:, :top_k]
        kept = weights.gather(1, order)
        return (hidden, index.gather(1, order), kept / kept.sum(1, True) * weights.sum(1, True)), {}

    handles = [m.register_forward_pre_hook(shrink, with_kwargs=True) for m in find_experts(model)]
    tokens, output = [prompt[-1]], []
    for _ in range(count):
        logits = model(torch.tensor([tokens]), **state).logits
        output.append(int(logits[0, -1].argmax()))
        tokens = [output[-1]]
    for handle in handles:
        handle.remove()
    return output


@pytest.mark.parametrize("family", MOE)
def test_drafts_with_fewer_experts_on_the_shared_cache(family: str) -> None:
    model = tiny_model(family)
    drafter, runner = bound(model)
    sequences = random_prompts(2, low=30, high=30)
    script = Script(drafter, sequences, [1, 0])
    script.admit([4, 9])
    ids = torch.tensor([s[:9] for s in sequences])
    runner.prefill(torch.tensor([1, 0]), ids, torch.tensor([4, 9]))
    draft = script.round(4, [0, 0])
    assert draft is not None
    for row, length in enumerate((4, 9)):
        expected = reduced_continuation(model, sequences[row][: length + 1], 1, 4)
        assert draft.tokens[row].tolist() == expected
    after = runner.forward(torch.tensor([[5]]), torch.tensor([0]), torch.tensor([[0]])).logits
    plain = model(torch.tensor([[5]])).logits
    torch.testing.assert_close(after, plain, atol=1e-4, rtol=1e-4)  # the reduction is over


def test_half_of_the_experts_by_default() -> None:
    drafter, _ = bound(tiny_model("qwen3_moe"), None)
    assert drafter.top_k == 2


def test_refuses_what_saves_nothing() -> None:
    with pytest.raises(ValueError, match="below the target's 4 experts per token, got 4"):
        bound(tiny_model("qwen3_moe"), 4)
    with pytest.raises(ValueError, match="needs a target with routed experts"):
        bound(tiny_model("llama"))
    with pytest.raises(ValueError, match="top_k must be >= 1, got 0"):
        SelfDrafter(0)


def test_the_routers_count_by_every_name_that_it_has() -> None:
    """Gemma 4's is ``top_k_experts``, HunYuan's may be a list of all layers'."""
    gemma = tiny_model("gemma2").config
    gemma.top_k_experts = 4
    model = tiny_model("qwen3_moe")
    for config in (gemma, SimpleNamespace(moe_topk=[4, 3])):
        runner: Any = SimpleNamespace(model=model, config=config, max_length=9, dtype=model.dtype)
        drafter, greedy = SelfDrafter(), GreedySampler(VOCAB)
        drafter.bind(runner, greedy, 2)  # type: ignore[arg-type]
        assert drafter.top_k == 2
        with pytest.raises(UserError, match="below the target's 4 experts per token, got 4"):
            SelfDrafter(4).bind(runner, greedy, 2)  # type: ignore[arg-type]


def test_two_decoders_need_two() -> None:
    """Drafts are written into the cache of the decoder's own target."""
    drafter, _ = bound(tiny_model("qwen3_moe"))
    with pytest.raises(UserError, match="self-drafter of its own for each decoder"):
        decoder(tiny_model("qwen3_moe"), drafter)

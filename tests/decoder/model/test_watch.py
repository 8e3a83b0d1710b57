"""A model that is changed after a decoder was built on it: followed, or refused in one line."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from support.model_changes import CHANGES, assign, attention, data_of_all
from support.tiny import random_prompts, tiny_model
from torch import nn

from decoder import SpeculativeDecoder
from decoder.drafters import SelfDrafter
from decoder.errors import UserError
from decoder.model import kernels
from decoder.model.runner import ModelRunner
from decoder.model.watch import Watch
from moesd_kernels.dense import ops
from moesd_kernels.hooks.shadow import unshadow

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))
IDS = torch.tensor([[9, 4, 33, 7, 12, 9, 50]])
SIZES = {"head_dim": 8, "attn_implementation": "sdpa", "attention_bias": True}


@pytest.fixture(scope="module")
def originals():
    return {name: tiny_model(name, **SIZES) for name in ("qwen3", "qwen3_moe")}


@pytest.fixture(params=["qwen3", "qwen3_moe"])
def model(request, originals):
    model = copy.deepcopy(originals[request.param])
    assert kernels.accelerate(model)
    return model


def forward(runner):
    rows, positions = torch.zeros(1, dtype=torch.long), torch.arange(IDS.shape[1])[None]
    return runner.forward(IDS, rows, positions).logits


@torch.no_grad()
def plain(model):
    return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_followed(model, change):
    runner = ModelRunner(model, 2, 64)
    before = forward(runner)
    change(model)
    after = forward(runner)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2), "the change does not show"
    torch.testing.assert_close(after, plain(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(after, forward(ModelRunner(model, 2, 64)))


def halve(module, args, out):
    halved = lambda x: 0.5 * x if isinstance(x, torch.Tensor) else x
    if hasattr(out, "logits"):
        out.logits = 0.5 * out.logits
        return out
    if hasattr(out, "last_hidden_state"):
        out.last_hidden_state = 0.5 * out.last_hidden_state
        return out
    return tuple(map(halved, out)) if isinstance(out, tuple) else halved(out)


PLACES = [
    "", "lm_head", "model", "model.embed_tokens", "model.norm", "model.layers.1",
    *(f"model.layers.1.{name}" for name in ("self_attn", "mlp", "input_layernorm")),
    *(f"model.layers.1.self_attn.{name}" for name in ("q_proj", "o_proj", "k_norm")),
]  # fmt: skip


@pytest.mark.parametrize("first", [False, True], ids=["hooked later", "hooked before"])
@pytest.mark.parametrize("place", PLACES)
def test_a_hook_is_heeded_and_forgotten_when_it_goes(model, place, first):
    module = model.get_submodule(place)
    unhooked = forward(ModelRunner(model, 2, 64))
    handle = module.register_forward_hook(halve) if first else None
    runner = ModelRunner(model, 2, 64)
    handle = handle or module.register_forward_hook(halve)
    hooked = forward(runner)
    # The norm before it undoes half of a residual stream, but for its epsilon.
    torch.testing.assert_close(hooked, plain(model), rtol=1e-4, atol=1e-4)
    assert not torch.equal(hooked, unhooked)
    start = torch.zeros(1, 1, dtype=torch.long)
    if not first:
        assert (runner.continue_greedily(IDS[:, :1], start[0], start, 2, 0) is None) == (
            runner._lean is None or not runner._lean.whole or place == "lm_head"
        )
    handle.remove()
    assert torch.equal(forward(runner), unhooked)
    assert first or runner._lean is not None


@pytest.mark.parametrize("first", [False, True], ids=["hooked later", "hooked before"])
def test_a_hook_on_an_activation_is_heeded(model, first):
    """Of an MLP or of experts, which kernels compute together with the products before it."""
    names = (name for name, _ in model.named_modules() if name.endswith("act_fn"))
    test_a_hook_is_heeded_and_forgotten_when_it_goes(model, list(names)[1], first)


def test_another_forward_of_an_activation_is_followed(model):
    runner = ModelRunner(model, 2, 64)
    before = forward(runner)
    for name, module in model.named_modules():
        if name.endswith("act_fn"):
            module.forward = torch.relu
    after = forward(runner)
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(after, plain(model), rtol=1e-4, atol=1e-4)
    exact = copy.deepcopy(model)
    unshadow(exact)
    torch.testing.assert_close(plain(model), plain(exact), rtol=1e-4, atol=1e-4)


def test_hooks_on_all_modules_are_heeded(model):
    runner, seen = ModelRunner(model, 2, 64), set()
    before = forward(runner)
    with nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m)):
        torch.testing.assert_close(forward(runner), before, rtol=1e-4, atol=1e-4)
    assert {attention(model).q_proj, model.model.layers[0].mlp} <= seen
    assert torch.equal(forward(runner), before)


def test_a_classs_forward_is_followed(model):
    runner = ModelRunner(model, 2, 64)
    before, cls = forward(runner), type(attention(model))
    own = cls.forward

    def patched(self, *args, **kwargs):
        out, weights = own(self, *args, **kwargs)
        return 0.5 * out, weights

    with mock.patch.object(cls, "forward", patched):
        after = forward(runner)
        torch.testing.assert_close(after, plain(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, rtol=1e-2)
    assert torch.equal(forward(runner), before)


def to_half(model):
    model.to(torch.bfloat16)


def resized(model):
    model.resize_token_embeddings(80)


def layers_replaced(model):
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])


def checkpointed(model):
    model.train()
    for layer in model.model.layers:  # as gradient_checkpointing_enable() does
        layer.gradient_checkpointing = True


def compiled(model):
    model.model.layers[1].compile()
    model.model.norm.eps = 1  # what is watched is not asked at every forward
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach())


def offloaded(model):
    model.model.layers[1].to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_half, "expected 64 tokens in torch.float32 on cpu, got 64 tokens in torch.bfloat16"),
        (resized, "expected 64 tokens in torch.float32 on cpu, got 80 tokens"),
        (layers_replaced, "has got other attention layers than its decoder was built for"),
        (checkpointed, "is in training with gradient checkpointing, which keeps no cache"),
        (compiled, r"model\.layers\.1 is compiled; expected a model as it was loaded"),
        (offloaded, "is on cpu, meta; expected all of its weights in the memory of one device"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_followed_is_refused_in_one_line(model, change, message):
    runner = ModelRunner(model, 2, 64)
    change(model)
    for _ in range(2):
        with pytest.raises(UserError, match=message) as error:
            forward(runner)
        assert "\n" not in str(error.value)


def test_static_forwards_are_captured_again():
    """Which is for CUDA graphs, and has not been run on a GPU."""
    model = tiny_model("qwen3", **SIZES)
    runner = ModelRunner(model, 2, 64, attention="portable", static=True)
    forward(runner)
    assert len(runner._graphs) == 1
    data_of_all(model)
    torch.testing.assert_close(forward(runner), plain(model), rtol=1e-4, atol=1e-4)
    with mock.patch.object(runner._graphs, "clear", wraps=runner._graphs.clear) as clear:
        forward(runner)
        assert not clear.called
        attention(model).v_proj.weight.data = attention(model).v_proj.weight.data.clone()
        forward(runner)
        assert clear.called
    handle = model.model.norm.register_forward_hook(halve)
    forward(runner)
    assert len(runner._graphs) == 0, "a hook would be captured"
    handle.remove()
    forward(runner)
    assert len(runner._graphs) == 1


def test_generation_follows_and_self_drafting_is_no_change(model):
    options = {"gamma": 3, "max_batch_size": 2, "max_length": 60}
    drafter = SelfDrafter(1) if hasattr(model.model.layers[0].mlp, "experts") else None
    decoder = SpeculativeDecoder(model, drafter, **options)
    prompts = random_prompts(3, low=4)
    outputs = lambda: [o.token_ids for o in decoder.generate(prompts)]
    before, lean = outputs(), decoder.runner._lean
    assert outputs() == before and decoder.runner._lean is lean is not None
    assign(model)
    after = outputs()
    assert after != before
    fresh = SpeculativeDecoder(model, None, **options)
    assert after == [o.token_ids for o in fresh.generate(prompts)]


def test_a_watch_holds_still_while_nothing_changes(model):
    watch = Watch(model, model.parameters())
    with ExitStack() as stack:
        plain(model)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
            parameter.requires_grad_(False)
        assert watch.unchanged()
        hook = attention(model).register_forward_pre_hook(lambda *_: None)
        stack.callback(hook.remove)
        assert not watch.unchanged()
    assert watch.unchanged()


def test_the_hooks_of_transformers_for_hidden_states_are_nobodys():
    model = tiny_model("qwen3", **SIZES)
    runner = ModelRunner(model, 2, 64, attention="portable", static=True)
    ids = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(2):
        runner.forward(ids, torch.zeros(1).long(), ids, hidden_layers=(1,), max_position=1)
    assert model.model.layers[0]._forward_hooks, "there are some"
    assert len(runner._graphs) == 1

"""``experts_implementation="moesd"`` in transformers models, against their own eager experts."""

from __future__ import annotations

import copy
import logging
from unittest import mock

import pytest
import torch
import transformers
from support.oracle import assert_as_accurate
from support.tiny import SPARSE_FAMILIES, sparse_model
from torch import nn

from moesd_kernels import accelerate, decelerate, register
from moesd_kernels.experts import api
from moesd_kernels.hooks import experts as hook
from moesd_kernels.hooks.gates import recognise_gate

PROMPT = torch.arange(22).view(2, 11) % 50
MAPPING = "transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS._global_mapping"


def routers(model):
    return [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]


def logits(model, implementation, routing=None):
    """Logits, with every router's weights and ids replaced by `routing` when given."""
    model.set_experts_implementation(implementation)
    seen = []

    def record(module, args, output):
        seen.append(output)
        if routing is None:
            return output
        _, weights, ids = routing[len(seen) - 1]
        return output[0], weights.to(output[1].dtype), ids

    handles = [router.register_forward_hook(record) for router in routers(model)]
    with torch.no_grad():
        result = model(PROMPT).logits
    for handle in handles:
        handle.remove()
    return result, seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_logits_within_the_oracle_bound(family, dtype):
    """Routing is taken from the fp64 run: a choice that flips on rounding is not an error."""
    register()
    model = sparse_model(family)
    exact, routing = logits(copy.deepcopy(model).double(), "eager")
    model = model.to(dtype)
    baseline, _ = logits(model, "eager", routing)
    actual, _ = logits(model, "moesd", routing)
    assert len(routing) == len(routers(model)) > 0
    assert_as_accurate(actual, baseline, exact.double(), name=family)


@pytest.mark.parametrize("family", SPARSE_FAMILIES)
def test_every_family_takes_the_fast_path(family, caplog):
    """No layer is handed over: an error in recognising a gate would pass every accuracy test."""
    register()
    model = sparse_model(family)
    hook._said.clear()
    with mock.patch.object(hook, "fused_experts", wraps=hook.fused_experts) as layer:
        logits(model, "moesd")
    assert layer.call_count == len(routers(model))
    assert "grouped_mm" not in caplog.text


def test_dispatch_goes_through_the_interface():
    register()
    model = sparse_model("qwen3_moe")
    ours = mock.Mock(wraps=hook.experts_forward)
    theirs = mock.Mock(side_effect=AssertionError("another implementation ran"))
    with mock.patch.dict(MAPPING, {"moesd": ours, "grouped_mm": theirs, "batched_mm": theirs}):
        logits(model, "moesd")
    assert ours.call_count == 2
    assert not theirs.called


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_from_pretrained_and_save_pretrained(family, tmp_path):
    register()
    model = sparse_model(family)
    model.save_pretrained(tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a", experts_implementation="moesd")
    assert loaded.config._experts_implementation == "moesd"
    with torch.no_grad():
        before = loaded(PROMPT).logits
    accelerate(loaded)
    loaded.save_pretrained(tmp_path / "b")
    again = type(model).from_pretrained(tmp_path / "b", experts_implementation="moesd")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(again(PROMPT).logits, before)


def test_generate_keeps_the_implementation():
    model = accelerate(sparse_model("qwen3_moe"))
    ours = mock.Mock(wraps=hook.experts_forward)
    with mock.patch.dict(MAPPING, {"moesd": ours}):
        out = model.generate(PROMPT, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == 14
    assert ours.call_count == 2 * 3


def test_accelerate_and_back():
    model = sparse_model("qwen3_moe")
    before = set(model.state_dict())
    assert accelerate(model) is model
    assert model.config._experts_implementation == "moesd"
    assert decelerate(model).config._experts_implementation == "batched_mm"  # as it was
    assert set(model.state_dict()) == before


def test_accelerate_leaves_a_dense_model_alone():
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=50,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        before = model(PROMPT).logits
        after = accelerate(model, dense=False)(PROMPT).logits
    assert torch.equal(before, after)


def handed_over(experts, caplog, *, grad=False, x=None):
    """The reason `experts` gives for handing one call to grouped_mm; compares with grouped_mm."""
    hook._said.clear()
    x = torch.randn(5, 32) if x is None else x
    ids, weights = torch.tensor([[0, 1]] * len(x)), torch.rand(len(x), 2)
    with torch.set_grad_enabled(grad), caplog.at_level(logging.WARNING, hook.__name__):
        outputs = [hook.experts_forward(experts, x, ids, weights) for _ in range(2)]
        experts.config._experts_implementation = "grouped_mm"
        assert torch.equal(outputs[0], experts(x, ids, weights))
    messages = [r.getMessage() for r in caplog.records if "grouped_mm" in r.getMessage()]
    assert len(messages) == 1, "said once"
    return messages[0], outputs[0]


def tiny_experts():
    return sparse_model("qwen3_moe").model.layers[0].mlp.experts


def test_gradients_hand_over(caplog):
    message, out = handed_over(tiny_experts(), caplog, grad=True)
    assert "gradients are needed" in message
    out.sum().backward()


def test_unknown_gate_hands_over(caplog):
    experts = tiny_experts()
    cls = type("OddExperts", (type(experts),), {})
    cls._apply_gate = lambda self, x: x.chunk(2, -1)[0].sin() * x.chunk(2, -1)[1]
    experts.__class__ = cls
    message, _ = handed_over(experts, caplog)
    assert "the gate of OddExperts is not one of the fused ones" in message


@pytest.mark.parametrize("limit", [7.0, 40.0, 2000.0])
@pytest.mark.parametrize("alpha", [None, 1.7])
def test_a_limit_is_seen_however_large(limit, alpha):
    def gate(self, x):
        gate, up = x.chunk(2, -1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if alpha is None:
            return nn.functional.silu(gate) * up
        return gate * (alpha * gate).sigmoid() * (up + 1)

    experts = tiny_experts()
    experts.__class__ = type("ClampedExperts", (type(experts),), {"_apply_gate": gate})
    assert recognise_gate(experts, True) is None  # a limit that it does not name
    experts.limit, experts.alpha = limit, alpha
    spec = recognise_gate(experts, True)
    assert (spec.activation_limit, spec.activation_alpha) == (limit, alpha)


def test_parameter_subclass_hands_over(caplog):
    class Quantized(nn.Parameter):
        pass

    experts = tiny_experts()
    experts.down_proj = Quantized(experts.down_proj.detach())
    message, _ = handed_over(experts, caplog)
    assert "Quantized, not plain tensors" in message


def test_mixed_dtypes_hand_over(caplog):
    experts = tiny_experts().bfloat16()
    message, _ = handed_over(experts, caplog, x=torch.randn(3, 32))
    assert "torch.bfloat16 and hidden states torch.float32" in message


def test_post_expert_norm_is_refused():
    experts = tiny_experts()
    experts.has_post_expert_norm = True
    assert "norm after the down projection" in hook.read_spec(experts).refusal


def test_expert_parallel_sentinels_contribute_nothing():
    experts = tiny_experts()
    E = experts.down_proj.shape[0]
    x, weights = torch.randn(4, 32), torch.rand(4, 2)
    ids = torch.tensor([[0, E], [E, E], [1, 2], [E, 3]])
    weights[ids == E] = 0
    with torch.no_grad():
        actual = hook.experts_forward(experts, x, ids, weights)
        experts.config._experts_implementation = "eager"
        # Clamped, where weights are 0: not every version's eager loop takes sentinels.
        expected = experts(x, ids.clamp(max=E - 1), weights)
        assert hook.experts_forward(experts, x[:0], ids[:0], weights[:0]).shape == (0, 32)
    torch.testing.assert_close(actual, expected)
    assert (actual[1] == 0).all()


def test_fp8_experts_of_another_layout_get_a_clear_error():
    """Scales for squares of 64; the registry of FP8 experts has our name too."""
    register()
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    forward = fp8.ALL_FP8_EXPERTS_FUNCTIONS.get_interface("moesd", None)
    experts = fp8.FP8Experts(sparse_model("qwen3_moe").config, block_size=(8, 8))
    with pytest.raises(NotImplementedError, match=r"cannot run FP8Experts: .*128 x 128"):
        forward(experts, torch.zeros(1, 32), torch.zeros(1, 1).long(), torch.ones(1, 1))


def test_settings_reach_the_backend():
    model = accelerate(
        sparse_model("qwen3_moe"), dense=False, backend="torch", batch_invariant=True
    )
    spy = mock.patch.object(api, "choose_backend", wraps=api.choose_backend)
    with spy as choose, torch.no_grad():
        model(PROMPT)
    assert {call.args[0] for call in choose.call_args_list} == {"torch"}
    assert all(call.args[1].batch_invariant for call in choose.call_args_list)


def test_bad_dense_option():
    with pytest.raises(ValueError, match="got 'yes'"):
        accelerate(sparse_model("qwen3_moe"), dense="yes")


def test_decisions_do_not_outlive_or_touch_the_module():
    experts = tiny_experts()
    attributes = set(vars(experts))
    hook.spec_of(experts)
    assert set(vars(experts)) == attributes
    assert experts in hook._specs
    count = len(hook._specs)
    del experts
    assert len(hook._specs) < count

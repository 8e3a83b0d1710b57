"""``accelerate`` says what it took over, and a refusal leaves the model as it was found."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch
import transformers
from support.tiny import sparse_model
from torch import nn

from decoder.model import kernels
from moesd_kernels import accelerate, available_backends, decelerate, register
from moesd_kernels.hooks import accelerate as hook
from moesd_kernels.hooks.experts import settings_of

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason="the CPU kernels cannot run here"
)


def lines(caplog):
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == hook.__name__]


def test_says_once_what_was_taken_over(caplog):
    caplog.set_level(logging.INFO, hook.__name__)
    model = accelerate(accelerate(sparse_model("qwen3_moe")))
    count = sum("forward" in vars(module) for module in model.modules())
    expected = f"moesd: 2 of 2 expert layers fused, {count} dense modules on the CPU kernels"
    assert lines(caplog) == [("INFO", expected)]


def test_a_decoder_keeps_what_the_owner_chose():
    model = accelerate(sparse_model("qwen3_moe"), backend="cpu", batch_invariant=True)
    experts = next(module for module in model.modules() if hasattr(module, "_apply_gate"))
    assert kernels.accelerate(model)
    assert settings_of(model) == settings_of(experts) == ("cpu", True)
    decelerate(model)
    assert settings_of(model) == settings_of(experts) == ("auto", False)


def test_says_that_there_are_no_experts(caplog):
    caplog.set_level(logging.INFO, hook.__name__)
    accelerate(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    expected = "moesd: no experts, 2 dense modules on the CPU kernels"
    assert lines(caplog) == [("INFO", expected)]


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


def without_interface(family):
    if family == "Dbrx":
        config = transformers.DbrxConfig(
            d_model=32, n_heads=4, n_layers=1, vocab_size=64,
            attn_config={"kv_n_heads": 4, "rope_theta": 1e4}, ffn_config={"ffn_hidden_size": 32},
        )  # fmt: skip
        return transformers.DbrxForCausalLM(config)
    config = transformers.JetMoeConfig(**SIZES, kv_channels=8, num_local_experts=4)
    return transformers.JetMoeForCausalLM(config)


@pytest.mark.parametrize("family", ["Dbrx", "JetMoe"])
def test_warns_where_no_experts_could_be_taken(family, caplog):
    register()
    accelerate(without_interface(family))
    [(level, message)] = lines(caplog)
    assert level == "WARNING"
    assert message.startswith("moesd: none of ") and f"({family}" in message
    assert "has no experts interface" in message


def test_warns_where_every_gate_is_refused(caplog):
    model = sparse_model("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True
    accelerate(model)
    assert lines(caplog)[0][0] == "WARNING"
    assert "none of 2 expert layers fused (experts have a norm after" in lines(caplog)[0][1]


class Fp8Experts(nn.Module):
    """As transformers' own: marked as experts, with weights of a byte each."""

    def __init__(self, config):
        super().__init__()
        self.config, self.is_concatenated, self.has_gate = config, True, True
        weight = torch.zeros(4, 8, 8).to(torch.float8_e4m3fn)
        self.gate_up_proj = nn.Parameter(weight, requires_grad=False)


def state(model):
    """Everything of a model that accelerating may touch."""
    attributes = [(name, dict(vars(m))) for name, m in model.named_modules()]
    config = model.config
    return (
        *(config._experts_implementation, config._attn_implementation),
        [(name, {k: v for k, v in a.items() if k == "forward" or k.startswith("_moesd")})
         for name, a in attributes],
    )  # fmt: skip


def test_quantised_experts_are_refused_and_the_model_is_left_as_found():
    model = sparse_model("qwen3_moe")
    model.model.layers[1].mlp.experts = Fp8Experts(model.config)
    found = state(model)
    with pytest.raises(NotImplementedError, match="got Fp8Experts with weights in"):
        accelerate(model)
    assert state(model) == found


@pytest.mark.parametrize("place", ["accelerate_dense", "spec_of", "_switch_experts"])
@pytest.mark.parametrize("already", [False, True], ids=["plain", "accelerated"])
def test_an_error_on_the_way_leaves_the_model_as_found(place, already):
    model = sparse_model("deepseek_v3")
    if already:
        accelerate(model, backend="torch")
    found = state(model)
    real = getattr(hook, place)

    def breaks(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt

    with mock.patch.object(hook, place, breaks), pytest.raises(KeyboardInterrupt):
        accelerate(model, batch_invariant=True)
    assert state(model) == found


def test_unknown_backends_are_refused_before_anything_is_touched():
    model = sparse_model("qwen3_moe")
    found = state(model)
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*, got 'fast'"):
        accelerate(model, backend="fast")
    assert state(model) == found


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_decelerate_gives_the_experts_back_as_they_were(implementation):
    model = sparse_model("qwen3_moe")
    model.set_experts_implementation(implementation)
    found = state(model)
    decelerate(accelerate(accelerate(model), batch_invariant=True))
    assert state(model) == found


class QuantLinear(nn.Linear):
    """As of a quantisation package: a subclass whose weights only it can read."""

    def forward(self, input):
        return super().forward(input).round(decimals=1)


@torch.no_grad()
def test_linears_of_other_packages_are_left_alone():
    model = sparse_model("qwen3_moe")
    for layer in model.model.layers:
        linear = layer.self_attn.k_proj
        quantised = QuantLinear(linear.in_features, linear.out_features, bias=False)
        quantised.weight = linear.weight
        layer.self_attn.k_proj = quantised
    ids = torch.arange(8)[None]
    before = model(ids).logits
    torch.testing.assert_close(accelerate(model)(ids).logits, before, rtol=1e-3, atol=1e-3)
    assert not any("forward" in vars(m) for m in model.modules() if type(m) is QuantLinear)

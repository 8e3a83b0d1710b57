"""Whatever is differentiated, and however, an accelerated module's own class computes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.tiny import sparse_model
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from moesd_kernels import accelerate, available_backends, fused_experts
from moesd_kernels.formats import WEIGHT_FORMATS, QuantizedLinear, quantize

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason="the CPU kernels cannot run here"
)
PROMPT = torch.arange(24).view(2, 12) % 50


def quantized() -> nn.Module:
    stored = quantize(torch.randn(8, 32), "int8", 32)
    return QuantizedLinear(*stored, torch.randn(8), WEIGHT_FORMATS["int8"])


MODULES = {
    "linear": lambda: nn.Linear(32, 8),
    "column": lambda: nn.Linear(32, 1),
    "quantised": quantized,
    "router": lambda: sparse_model("gpt_oss").model.layers[0].mlp.router,
}


def accelerated(kind: str) -> tuple[Any, Any]:
    """A module that gives no gradients yet, accelerated, and as it was."""
    holder = nn.Sequential(MODULES[kind]().requires_grad_(False))
    return accelerate(copy.deepcopy(holder))[0], holder[0]


def logits(out: Any) -> Tensor:
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


@pytest.mark.parametrize("kind", MODULES)
def test_a_bias_alone_is_trained(kind: str) -> None:
    x, modules = torch.randn(5, 32), accelerated(kind)
    for module in modules:
        module.bias.requires_grad_(True)
        logits(module(x)).square().sum().backward()
    torch.testing.assert_close(modules[0].bias.grad, modules[1].bias.grad)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_each_part_of_a_model_is_trained_alone(family: str) -> None:
    """Norms, biases, routers, experts: one parameter of the last layer, all others frozen."""
    plain = sparse_model(family)
    models = plain, accelerate(copy.deepcopy(plain))
    for name in (name for name, _ in plain.named_parameters() if "layers.1." in name):
        grads: list[Tensor] = []
        for model in models:
            parameter = model.requires_grad_(False).get_parameter(name).requires_grad_(True)
            loss = model(PROMPT, labels=PROMPT).loss
            grads += torch.autograd.grad(loss, parameter)
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_forward_mode(kind: str) -> None:
    x, modules = torch.randn(5, 32), accelerated(kind)
    biases = [
        jvp(lambda b, m=m: logits(functional_call(m, {"bias": b}, x)), *at(m.bias)) for m in modules
    ]
    inputs = [jvp(lambda v, m=m: logits(m(v)), *at(x)) for m in modules]
    torch.testing.assert_close(*biases)
    torch.testing.assert_close(*inputs)


def at(value: Tensor) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """Where to take a derivative, and along what."""
    return (value,), (torch.ones_like(value),)


@pytest.mark.parametrize("kind", MODULES)
def test_under_vmap(kind: str) -> None:
    x, modules = torch.randn(3, 5, 32), accelerated(kind)
    total = lambda v, m: vmap(lambda rows: logits(m(rows)).square().sum())(v).sum()
    torch.testing.assert_close(*(grad(total)(x, m) for m in modules))


def test_parts_of_a_layer_under_vmap() -> None:
    plain = sparse_model("qwen2_moe").requires_grad_(False)
    layers = [m.model.layers[0] for m in (plain, accelerate(copy.deepcopy(plain)))]
    x = torch.randn(2, 1, 12, 32)
    for name in ("input_layernorm", "mlp"):
        parts = [getattr(layer, name) for layer in layers]
        torch.testing.assert_close(*(vmap(m)(x) for m in parts), rtol=1e-4, atol=1e-5)
        total = lambda v, m: vmap(lambda rows: m(rows).square().sum())(v).sum()
        grads = [grad(total)(x, m) for m in parts]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_forward_mode_through_a_model() -> None:
    """Norms, MLPs and experts; the choice of a routed expert is the same for both."""
    plain = sparse_model("qwen2_moe").requires_grad_(False)
    x = plain.get_input_embeddings()(PROMPT)
    ours = accelerate(copy.deepcopy(plain))
    run = lambda m: jvp(lambda v: m(inputs_embeds=v, use_cache=False).logits, *at(x))
    torch.testing.assert_close(run(ours), run(plain), rtol=1e-3, atol=1e-4)


def test_forward_mode_through_the_experts() -> None:
    experts = sparse_model("qwen3_moe").requires_grad_(False).model.layers[0].mlp.experts
    ids, weights = torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2)
    x = torch.randn(2, 32)
    run = lambda v: fused_experts(v, experts.gate_up_proj, experts.down_proj, ids, weights)
    run(x)  # the way of a back-end that was chosen before
    experts.config._experts_implementation = "eager"
    expected = jvp(lambda v: experts(v, ids, weights), *at(x))
    torch.testing.assert_close(jvp(run, *at(x)), expected, rtol=1e-4, atol=1e-5)

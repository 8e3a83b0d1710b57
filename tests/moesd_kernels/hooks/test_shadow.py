"""An accelerated model can still be copied, stored, converted and changed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from support.model_changes import Halved
from support.tiny import sparse_model
from torch import nn

from moesd_kernels import accelerate, available_backends
from moesd_kernels.hooks.dense import accelerate_dense
from moesd_kernels.hooks.experts import settings_of
from moesd_kernels.hooks.shadow import is_unshadowed, shadow_of

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason="the CPU kernels cannot run here"
)
PROMPT = torch.arange(24).view(2, 12) % 50
FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss"]  # a fused router, a composed one, biases


@torch.no_grad()
def logits(model):
    return model(PROMPT).logits


def shadows(model):
    return [name for name, module in model.named_modules() if shadow_of(module) is not None]


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    plain = sparse_model(request.param)
    return plain, accelerate(copy.deepcopy(plain))


def test_a_deep_copy_is_accelerated_and_its_own(models):
    model = copy.deepcopy(models[1])
    twin = copy.deepcopy(model)
    assert shadows(twin) == shadows(model) != []
    assert torch.equal(logits(twin), logits(model))
    before = logits(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)


def test_choices_go_with_a_copy():
    model = accelerate(
        sparse_model("qwen3_moe"), dense=False, backend="torch", batch_invariant=True
    )
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        chosen = {settings_of(m) for m in twin.modules() if hasattr(m, "_apply_gate")}
        assert chosen == {("torch", True)}
    accelerate(model, dense=False)
    assert {settings_of(m) for m in model.modules()} == {("auto", False)}


def test_a_pickle_holds_the_model_alone(models):
    plain, model = models
    loaded = pickle.loads(pickle.dumps(model))
    assert not shadows(loaded) and all(map(is_unshadowed, loaded.modules()))
    loaded.set_experts_implementation(plain.config._experts_implementation)
    assert torch.equal(logits(loaded), logits(plain))
    assert torch.equal(logits(accelerate(loaded)), logits(model))
    assert shadows(loaded) == shadows(model)


def test_a_saved_module_loads_where_our_package_is_not(tmp_path):
    """As an adapter's or a layer's would be, with ``torch.save``."""
    layer = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1))
    accelerate_dense(layer)
    x = torch.randn(3, 8)
    torch.save((layer, x, layer(x).detach()), tmp_path / "layer.pt")
    code = (
        "import sys, torch; sys.modules['moesd_kernels'] = None\n"
        "layer, x, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(layer(x).detach(), expected)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "layer.pt")], check=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_can_be_converted(models, dtype):
    plain, model = models
    converted = copy.deepcopy(model).to(dtype)
    expected = logits(copy.deepcopy(plain).to(dtype)).float()
    # Half precision rounds in other places than eager PyTorch does; its own error is the scale.
    scale = (expected - logits(plain)).abs().max() if dtype != torch.float64 else 1e-4
    assert (logits(converted).float() - expected).abs().max() <= 4 * scale
    back = converted.float()
    assert torch.equal(logits(accelerate(copy.deepcopy(back))), logits(back))


def test_weights_can_be_loaded_and_saved(models, tmp_path):
    plain, model = models
    model = copy.deepcopy(model)
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "ours")
    name = "model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    other = {key: 1.1 * value for key, value in plain.state_dict().items()}
    expected = copy.deepcopy(plain)
    expected.load_state_dict(other)
    model.load_state_dict(other, assign=True)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-3, atol=1e-3)


def test_nothing_of_the_process_is_moved():
    model = sparse_model("qwen2_moe")
    state, training = torch.get_rng_state(), [m.training for m in model.modules()]
    config = copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.generation_config.to_dict())
    attention = model.config._attn_implementation
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    gradients = [p.requires_grad for p in model.parameters()]
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == config
    assert model.config._attn_implementation == attention
    assert [m.training for m in model.modules()] == training
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_the_callers_defaults_do_not_matter(family):
    """Neither the default dtype nor the default device decides what is taken over."""
    expected = shadows(accelerate(sparse_model(family)))
    model = sparse_model(family)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            accelerate(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert shadows(model) == expected


def changed(change, kind):
    """An accelerated model's logits after ``change`` of the modules of a kind, and what a model
    that was never accelerated gives then."""
    results = []
    for prepare in (accelerate, lambda model: model):
        model = prepare(sparse_model("qwen2_moe"))
        for module in list(model.modules()):
            if type(module).__name__.endswith(kind):
                change(module)
        results.append(logits(model))
    return results


def other_activation(module):
    module.act_fn = nn.GELU()


def fewer_experts(router):
    router.top_k = 1


def other_weights(linear):
    linear.weight = nn.Parameter(2 * linear.weight.detach())


def transposed_data(linear):
    if linear.in_features == linear.out_features:
        linear.weight.data = linear.weight.data.t()


def weight_norm(linear):
    nn.utils.parametrizations.weight_norm(linear)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(0.5)


def hook(linear):
    linear.register_forward_hook(lambda module, args, out: 0.5 * out)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (other_activation, "MLP"),
        (other_activation, "Experts"),
        (fewer_experts, "TopKRouter"),
        (other_weights, "Linear"),
        (transposed_data, "Linear"),
        (weight_norm, "Linear"),
        (hook, "Linear"),
        (hook, "RMSNorm"),
        (hook, "SparseMoeBlock"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_change_after_accelerating_is_followed(change, kind):
    actual, expected = changed(change, kind)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


class HalvedWithMethod(Halved):
    """As the layers of torch's dynamic quantisation."""

    def weight(self):
        return self.inner.weight


@pytest.mark.parametrize("wrapper", [Halved, HalvedWithMethod])
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_layer_that_is_wrapped_after_accelerating(name, wrapper):
    def wrap(mlp):
        setattr(mlp, name, wrapper(getattr(mlp, name)))

    actual, expected = changed(wrap, "MLP")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

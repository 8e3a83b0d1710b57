"""``use_int8_activations``: a choice of a model's owner, the same by modules, kernels and walk."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.formats import INTEGERS, QUANTISED, check_int8_product, stored_weight
from support.tiny import VOCAB, tiny_model
from torch import nn

from decoder.model.runner import ModelRunner
from moesd_kernels import accelerate, available_backends, quantize, use_int8_activations
from moesd_kernels.formats import WEIGHT_FORMATS, QuantizedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.arange(12).view(2, 6)
needs_kernels = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason="the CPU kernels cannot run here"
)


def model_of(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """One whose depths all are multiples of 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    return tiny_model(family, dtype, **sizes | {"head_dim": 16} | changes)


def layer_of(name: str, dtype: torch.dtype, bias: bool = True) -> QuantizedLinear:
    weight, scale = stored_weight(name, 37, 512)
    shift = torch.randn(37, generator=torch.Generator().manual_seed(1)).to(dtype)
    return QuantizedLinear(weight, scale, shift if bias else None, WEIGHT_FORMATS[name])


def flags(model: nn.Module) -> set[bool]:
    return {m.int8_activations for m in model.modules() if isinstance(m, QuantizedLinear)}


@torch.no_grad()
def test_on_and_off():
    model = quantize(model_of(), "int4")
    assert flags(model) == {False}
    before = model(IDS).logits
    assert use_int8_activations(model) is model and flags(model) == {True}
    rounded = model(IDS).logits
    assert not torch.equal(rounded, before)
    assert (rounded - before).std() < 0.05 * before.std()
    assert use_int8_activations(model, enabled=False) is model and flags(model) == {False}
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(64, 4),
        model_of,
        lambda: nn.Sequential(layer_of("fp8_block", torch.float32), nn.Linear(512, 4)),
    ],
    ids=["linear", "plain", "floats"],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_a_model_without_such_layers_is_refused(make, enabled):
    model = make()
    message = f"{type(model).__name__} has no .*layer with weights in integers"
    with pytest.raises(ValueError, match=message):
        use_int8_activations(model, enabled)
    assert flags(model) <= {False}


def test_layers_of_other_formats_stay_as_they_are():
    layers = {name: layer_of(name, torch.float32) for name in QUANTISED}
    use_int8_activations(nn.ModuleDict(layers))
    assert {name for name, layer in layers.items() if layer.int8_activations} == set(INTEGERS)


def test_nothing_that_is_stored_changes():
    model = quantize(model_of(), "int8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_int8_activations(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    model.load_state_dict(before)
    assert flags(model) == {True}


@torch.no_grad()
def test_copies_and_pickles_keep_it():
    model = use_int8_activations(quantize(model_of(), "int4"))
    expected = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert flags(other) == {True}
        assert torch.equal(other(IDS).logits, expected)


def test_it_is_shown():
    layer = layer_of("q4_0", torch.float32)
    shown = "in_features=512, out_features=37, bias=True, weight_format=q4_0"
    assert layer.extra_repr() == shown
    assert use_int8_activations(layer).extra_repr() == f"{shown}, int8_activations=True"


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INTEGERS)
@torch.no_grad()
def test_a_layer_by_torch_and_by_the_kernels(name, dtype):
    for bias in (True, False):
        layer = use_int8_activations(layer_of(name, dtype, bias))
        x = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
        outputs = [layer(x), accelerate(nn.Sequential(layer))(x)]
        for out in outputs:
            assert out.shape == (2, 3, 37)
            stored = layer.weight, layer.weight_scale, name, layer.bias
            check_int8_product(out.view(6, 37), x.view(6, 512), *stored)


@needs_kernels
@pytest.mark.parametrize("name", [name for name in QUANTISED if name not in INTEGERS])
@torch.no_grad()
def test_the_flag_of_a_layer_that_is_not_of_integers_changes_nothing(name):
    layer = layer_of(name, torch.float32)
    x = torch.randn(5, 512)
    alone, kernels = layer(x), accelerate(nn.Sequential(copy.deepcopy(layer)))
    expected = kernels(x)
    layer.int8_activations = kernels[0].int8_activations = True
    assert torch.equal(layer(x), alone) and torch.equal(kernels(x), expected)


@needs_kernels
def test_calls_are_traced_with_it():
    weight, scale = stored_weight("int8", 37, 64)
    arguments = torch.randn(5, 64), weight, None, scale, "int8", True
    torch.library.opcheck(torch.ops.moesd.linear.default, arguments)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_tokens_together_are_tokens_one_by_one(family, weight_format, dtype):
    """To the bit, in the walk over layers in C++ as by their modules, which agree."""
    model = use_int8_activations(quantize(model_of(family, dtype), weight_format))
    runner = ModelRunner(accelerate(model), 2, 64)
    walk = runner._lean
    assert walk is not None and walk.whole
    ids, rows = torch.randint(VOCAB, (2, 21)), torch.arange(2)
    places = torch.arange(21).repeat(2, 1)
    together = []
    for choice in (walk, None):
        runner._lean = choice
        together.append(runner.forward(ids, rows, places).logits)
        for step in (1, 2, 7):
            parts = [
                runner.forward(ids[:, i : i + step], rows, places[:, i : i + step]).logits
                for i in range(0, 21, step)
            ]
            assert torch.equal(torch.cat(parts, dim=1), together[-1])
    assert torch.equal(*together)


@needs_kernels
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_greedy_steps_are_those_of_single_forwards(weight_format):
    model = use_int8_activations(quantize(model_of(), weight_format))
    assert model.get_output_embeddings().int8_activations
    runner = ModelRunner(accelerate(model), 2, 64)
    ids, rows = torch.randint(VOCAB, (2, 2)), torch.arange(2)
    places = torch.arange(2).repeat(2, 1)
    tokens, undefined = runner.continue_greedily(ids, rows, places, 6, 1)
    assert not undefined.any()
    fed, chosen = ids, []
    for _ in range(6):
        logits = runner.forward(fed, rows, places).logits[:, -1:]
        fed, places = logits.float().argmax(-1), places[:, -1:] + 1
        chosen.append(fed)
    assert torch.equal(tokens, torch.cat(chosen, dim=1))


@needs_kernels
def test_projections_that_differ_in_it_do_not_become_one():
    """Queries that are rounded, and keys and values that are not: as their modules compute."""
    model = quantize(model_of(), "int8")
    use_int8_activations(model.model.layers[0].self_attn.q_proj)
    accelerate(model)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
    runner = ModelRunner(model, 2, 64)
    assert runner._lean is None
    together = runner.forward(IDS, torch.arange(2), torch.arange(6).repeat(2, 1)).logits
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_gradients_are_about_those_of_activations_that_are_not_rounded(family, weight_format):
    """Through linear layers and experts: what trains in front of them, as adapters do."""
    model = quantize(model_of(family), weight_format)
    gradients = []
    for enabled in (False, True):
        use_int8_activations(model, enabled)
        inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=inputs, labels=IDS).loss.backward()
        gradients.append(inputs.grad.flatten())
    plain, rounded = gradients
    assert (rounded - plain).norm() < 0.2 * plain.norm()

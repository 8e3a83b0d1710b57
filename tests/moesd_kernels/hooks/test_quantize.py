"""``quantize``: models that compute with what their integers stand for, and can be stored."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.tiny import SPARSE_FAMILIES, tiny_model
from torch import nn

from moesd_kernels import (
    accelerate,
    decelerate,
    quantize,
    quantize_experts,
    use_int8_activations,
)
from moesd_kernels.formats import QuantizedLinear, dequantize

# Depths that 32 divides: every matrix of these models is taken.
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 16,
}  # fmt: skip
IDS = torch.arange(12).view(2, 6)


def model_of(family="qwen3_moe", dtype=torch.float32, **changes):
    extra = {**SPARSE_FAMILIES[family], **({"head_dim": 8} if "deepseek" in family else {})}
    extra |= {"shared_expert_intermediate_size": 32} if family == "qwen2_moe" else {}
    sizes = {"first_k_dense_replace": 0, "num_experts_per_tok": 2, **SIZES, **extra}
    return tiny_model(family, dtype, **sizes | changes)


def read_back(model, quantized):
    """``model`` with the numbers that the integers of ``quantized`` stand for, in its own dtype."""
    stored = quantized.state_dict()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = stored.get(f"{name}_scale")
            if scale is None:
                continue
            bits = "int8" if stored[name].dtype == torch.int8 else "int4"
            values = dequantize(stored[name], scale, bits, weight.dtype)
            weight.copy_(values if values.shape == weight.shape else values.mT)
    return model


def close(actual, expected):
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


def experts_by_torch(model):
    """The experts on PyTorch alone, with weights of any format, and nothing else replaced."""
    return accelerate(model, dense=False, backend="torch")


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize("family", SPARSE_FAMILIES)
@torch.no_grad()
def test_a_quantised_model_is_one_with_other_numbers(family, weight_format):
    """Not accelerated, and accelerated; transposed and interleaved experts and biases too."""
    plain = model_of(family)
    quantized = quantize(copy.deepcopy(plain), weight_format)
    integers = [p for p in quantized.parameters() if not p.is_floating_point()]
    assert sum(p.numel() for p in integers) > 0.3 * sum(p.numel() for p in quantized.parameters())
    expected = experts_by_torch(read_back(plain, quantized))(IDS).logits
    # A matrix that was stored the other way round is summed in another order.
    same = close if family == "gpt_oss" else torch.equal
    assert close(quantized(IDS).logits, expected)
    assert same(experts_by_torch(quantized)(IDS).logits, expected)
    decelerate(quantized)
    assert close(quantized(IDS).logits, expected)
    assert close(accelerate(quantized)(IDS).logits, expected)


def test_experts_alone():
    model = quantize_experts(model_of(), "int4", group=64)
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters()}
    assert kinds["gate_up_proj"] == kinds["down_proj"] == torch.uint8
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    experts = model.model.layers[0].mlp.experts
    assert experts.gate_up_proj_scale.shape[-1] == 1  # of 64 weights
    assert experts.down_proj_scale.shape[-1] == 1  # of 32: 64 is more than there are


@torch.no_grad()
def test_one_scale_for_a_row():
    model = quantize(model_of(dtype=torch.bfloat16), "int8", group=None)
    scales = {n: p.shape[-1] for n, p in model.named_parameters() if n.endswith("_scale")}
    assert scales and set(scales.values()) == {1}
    expected = model(IDS).logits
    assert (accelerate(model)(IDS).logits - expected).norm() < 0.03 * expected.norm()


def test_bits():
    model = model_of(num_hidden_layers=1)
    before = sum(p.nbytes for n, p in model.named_parameters() if "experts" in n)
    quantize(model, "int8", group=32)
    after = sum(p.nbytes for n, p in model.named_parameters() if "experts" in n)
    assert after / before == 8.5 / 32


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@torch.no_grad()
def test_a_file_and_back(tmp_path, weight_format):
    """Two tensors a matrix; the other model is made without memory, quantised, then loaded."""
    model = quantize(model_of(dtype=torch.bfloat16), weight_format)
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert set(state) == {name for name, _ in model.named_parameters()}
    with torch.device("meta"):
        other = type(model)(model.config).to(torch.bfloat16)
    quantize(other, weight_format)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    buffers = dict(model.named_buffers())
    for name, _ in list(other.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        other.get_submodule(owner)._buffers[leaf] = buffers[name]
    assert torch.equal(other.eval()(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_a_tied_head_becomes_a_matrix_of_its_own():
    model = model_of(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    assert model.lm_head.weight is embedding
    quantize(model, "int8")
    assert model.model.embed_tokens.weight is embedding and embedding.is_floating_point()
    assert type(model.lm_head) is QuantizedLinear and not model.config.tie_word_embeddings
    before = model(IDS).logits
    model.tie_weights()
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_copies_pickles_and_dtypes():
    model = quantize(model_of(), "int4")
    expected = model(IDS).logits
    assert torch.equal(copy.deepcopy(model)(IDS).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, expected)
    scales = {n: p.clone() for n, p in model.named_parameters() if n.endswith("_scale")}
    model.to(torch.float16).to(torch.float32)
    assert all(torch.equal(p, scales[n]) for n, p in model.named_parameters() if n in scales)


def test_what_does_not_fit_stays_and_is_said(caplog):
    model = model_of(moe_intermediate_size=24)
    with caplog.at_level(logging.WARNING, logger="moesd_kernels"):
        quantize(model, "int8")
    assert "2 modules stay as they were, with depths that 32 does not divide" in caplog.text
    assert "the first is model.layers.0.mlp.experts" in caplog.text
    assert type(model.lm_head) is QuantizedLinear
    with pytest.raises(ValueError, match=r"has no weights that can be int8.*'model\.layers\.0"):
        quantize_experts(model_of(moe_intermediate_size=24), "int8")
    with pytest.raises(ValueError, match="'int8' or 'int4', got 'fp8'"):
        quantize(model, "fp8")
    with pytest.raises(ValueError, match=r"\(32, 64, 128\) or None, got 48"):
        quantize(nn.Linear(96, 4), "int8", group=48)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "FalconMamba"])
@torch.no_grad()
def test_a_matrix_that_a_models_code_looks_at_stays(name):
    """``dt_proj.weight`` is multiplied by, and hidden states become ``lm_head.weight.dtype``."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=32, hidden_size=64, state_size=8, num_hidden_layers=1, time_step_rank=32,
        num_heads=4, head_dim=32, n_groups=1, pad_token_id=0,
    )  # fmt: skip
    plain = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    quantized = quantize(copy.deepcopy(plain), "int8")
    assert type(quantized.backbone.layers[0].mixer.in_proj) is QuantizedLinear
    assert close(quantized(IDS).logits, read_back(plain, quantized)(IDS).logits)
    with pytest.raises(TypeError, match=r"floating, got torch\.int8"):
        quantized.backbone.layers[0].mixer.in_proj(torch.zeros(1, 64, dtype=torch.int8))


@torch.no_grad()
def test_a_model_that_takes_no_tokens():
    config = transformers.PatchTSTConfig(
        d_model=64, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64
    )
    plain = transformers.PatchTSTModel(config).eval()
    x = torch.randn(1, config.context_length, config.num_input_channels)
    quantized = quantize(copy.deepcopy(plain), "int8")
    expected = read_back(plain, quantized)(x).last_hidden_state
    assert close(quantized(x).last_hidden_state, expected)


@pytest.mark.parametrize(
    "change", [accelerate, decelerate, use_int8_activations, lambda model: quantize(model, "int8")]
)
@pytest.mark.parametrize("model", ["a/folder", None, nn.Linear])
def test_what_is_no_model_is_named(change, model):
    with pytest.raises(TypeError, match=r"must be a loaded model.*got ('a/folder'|None|<class)"):
        change(model)


def test_a_layer_alone_cannot_be_replaced():
    with pytest.raises(ValueError, match=r"Linear has no weights that can be int8: .*got \[\]"):
        quantize(nn.Linear(64, 64), "int8")

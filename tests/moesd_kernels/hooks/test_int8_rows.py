"""Packed linear layers stored anew as rows of int8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import tiny_model

from moesd_kernels import quantize
from moesd_kernels.formats import WEIGHT_FORMATS, QuantizedLinear
from moesd_kernels.hooks.int8_rows import store_as_int8_rows

SIZES = {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 32}


def linears(model: Any) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def numbers(linear: QuantizedLinear) -> torch.Tensor:
    return WEIGHT_FORMATS[linear.weight_format].decode(linear.weight, linear.weight_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_the_numbers_are_those_of_before_rounded_by_row(
    weight_format: str, dtype: torch.dtype
) -> None:
    model = quantize(tiny_model("qwen2_moe", dtype, **SIZES), weight_format)
    before = {name: (numbers(m), m.bias) for name, m in linears(model).items()}
    experts = [m.gate_up_proj for m in model.modules() if hasattr(m, "gate_up_proj")]
    assert store_as_int8_rows(model) is model
    assert before and linears(model).keys() == before.keys()
    for name, linear in linears(model).items():
        weight, bias = before[name]
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        assert linear.weight_format == "int8" and linear.weight_scale.shape[1] == 1
        assert ((numbers(linear) - weight).abs() <= step * (0.5 + 2**-7)).all()
        assert bias is None or torch.equal(linear.bias, bias)
    after = [m.gate_up_proj for m in model.modules() if hasattr(m, "gate_up_proj")]
    assert len(experts) == 2 and all(a is b for a, b in zip(experts, after, strict=True))


def test_only_groups_are_stored_anew() -> None:
    model = quantize(tiny_model("llama", **SIZES), "int8", group=None)
    layers = linears(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no linear layer that is packed"):
        store_as_int8_rows(model)
    assert all(linear is layers[name] for name, linear in linears(model).items())
    with pytest.raises(ValueError, match="no linear layer that is packed in groups"):
        store_as_int8_rows(tiny_model("llama"))

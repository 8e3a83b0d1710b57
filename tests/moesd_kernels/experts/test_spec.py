"""``ExpertsSpec``: checked once, the one place where Python spells the options of the layer."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from support.oracle import make_case

from moesd_kernels import ExpertsSpec, fused_experts, library
from moesd_kernels.experts.spec import OPTIONS
from moesd_kernels.formats import WEIGHT_FORMATS

NAMES = [option.name for option in OPTIONS]


def test_an_alias_is_the_same_spec():
    specs = {ExpertsSpec(name) for name in ("gelu_tanh", "gelu_pytorch_tanh", "gelu_new")}
    assert specs == {ExpertsSpec(activation="gelu_tanh")}
    assert ExpertsSpec("swish") == ExpertsSpec()


def test_a_down_projection_of_the_same_format_is_no_other_spec():
    assert ExpertsSpec(weight_format="q4_k", down_format="q4_k") == ExpertsSpec(
        weight_format="q4_k"
    )
    mixed = ExpertsSpec(weight_format="q4_k", down_format="q6_k")
    assert mixed.formats == mixed.op_options[-3:-1] == ("q4_k", "q6_k")
    assert dataclasses.replace(ExpertsSpec(), weight_format="int8").formats == ("int8", "int8")


def test_a_replaced_field_is_checked_and_reaches_the_op():
    spec = dataclasses.replace(ExpertsSpec(), activation="swish", activation_limit=7.0)
    assert spec.op_options == ("silu", True, False, False, 7.0, None, "plain", "plain", False)
    with pytest.raises(ValueError, match="got 'mish'"):
        dataclasses.replace(spec, activation="mish")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.gated = False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "mish"}, "activation must be one of .*'silu'.*, got 'mish'"),
        ({"weight_format": "int3"}, r"weight_format must be one of .*'plain'.*, got 'int3'"),
        ({"down_format": "int3"}, r"down_format must be one of .*'plain'.*, got 'int3'"),
        ({"weight_format": "q4_0", "transposed": True}, "transposed=True needs .*; got 'q4_0'"),
        ({"down_format": "q4_0", "transposed": True}, "needs down_format='plain'.*; got 'q4_0'"),
        ({"gated": False, "interleaved": True}, "need gated=True.* interleaved=True"),
        ({"gated": False, "activation_limit": 1.0}, "need gated=True.* activation_limit=1.0"),
        ({"gated": False, "activation_alpha": 1.0}, "need gated=True.* activation_alpha=1.0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ExpertsSpec(**options)
    with pytest.raises(ValueError, match=message):
        fused_experts(*make_case(2, 1, 2, 8, 4).tensors, **options)


def test_the_table_of_formats_has_the_default():
    assert ExpertsSpec().weight_format in WEIGHT_FORMATS


def test_options_are_short_for_a_spec():
    case = make_case(6, 2, 4, 32, 16, interleaved=True, activation_limit=0.5, activation="gelu")
    spec = ExpertsSpec(**case.options)
    by_options = fused_experts(*case.tensors, **case.options)
    assert torch.equal(by_options, fused_experts(*case.tensors, spec=spec))
    assert not torch.equal(by_options, fused_experts(*case.tensors))


def test_unknown_options_and_both_at_once():
    tensors = make_case(2, 1, 2, 8, 4).tensors
    with pytest.raises(TypeError, match="'activation_function'"):
        fused_experts(*tensors, activation_function="gelu")
    with pytest.raises(TypeError, match=r"spec or single options, .*\['gated'\]"):
        fused_experts(*tensors, spec=ExpertsSpec(), gated=True)


def test_help_shows_every_option():
    parameters = inspect.signature(fused_experts).parameters
    assert [name for name in parameters if name in NAMES] == NAMES
    assert all(parameters[option.name].default == option.default for option in OPTIONS)
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.skipif(library.load("cpu") is not None, reason=str(library.load("cpu")))
def test_the_schemas_have_the_options_in_this_order():
    own = [argument.name for argument in torch.ops.moesd.experts.default._schema.arguments]
    scales = ["gate_up_scale", "down_scale"]
    assert own[-len(NAMES) - 3 :] == [*NAMES, *scales, "out"]
    quick = [argument.name for argument in torch.ops.moesd.try_experts.default._schema.arguments]
    assert quick[-len(NAMES) - 2 :] == [*NAMES, *scales]
    traced = [argument.name for argument in torch.ops.moesd.fused_experts.default._schema.arguments]
    assert traced[-len(NAMES) - 2 : -2] == NAMES

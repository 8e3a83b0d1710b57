"""What ``fused_experts`` refuses, in words; and its quick way, which refuses by value."""

from __future__ import annotations

import pytest
import torch
from support.oracle import make_case

from moesd_kernels import available_backends, fused_experts
from moesd_kernels.experts.backends import BACKENDS
from moesd_kernels.experts.spec import DEFAULT_SPEC

UNAVAILABLE = available_backends()["cpu"]


def wrong(**changes):
    """A good call with some arguments replaced."""
    names = ("hidden_states", "w_gate_up", "w_down", "topk_ids", "topk_weights")
    arguments = dict(zip(names, make_case(4, 2, 3, 16, 8).tensors, strict=True)) | changes
    return [arguments.pop(name) for name in names], arguments


ERRORS = {
    "hidden-rank": (wrong(hidden_states=torch.zeros(1, 4, 16)), ValueError, r"\(1, 4, 16\)"),
    "hidden-dtype": (wrong(hidden_states=torch.zeros(4, 16).int()), TypeError, "torch.int32"),
    "weight-dtype": (wrong(w_down=torch.zeros(3, 16, 8).half()), TypeError, "w_down torch.float16"),
    "ids-dtype": (wrong(topk_ids=torch.zeros(4, 2)), TypeError, "got torch.float32"),
    "weights-dtype": (wrong(topk_weights=torch.zeros(4, 2).int()), TypeError, "got torch.int32"),
    "hidden-size": (wrong(hidden_states=torch.zeros(4, 15)), ValueError, r"\(4, 15\)"),
    "down-rank": (wrong(w_down=torch.zeros(16, 8)), ValueError, r"got shape \(16, 8\)"),
    "gate-up-shape": (wrong(w_gate_up=torch.zeros(3, 8, 16)), ValueError, r"got \(3, 8, 16\)"),
    "experts": (wrong(w_gate_up=torch.zeros(2, 16, 16)), ValueError, r"must be \(3, 16, 16\)"),
    "ids-rows": (wrong(topk_ids=torch.zeros(5, 2).long()), ValueError, r"T = 4, got \(5, 2\)"),
    "weights-shape": (wrong(topk_weights=torch.zeros(4, 3)), ValueError, r"got \(4, 3\)"),
    "bias-shape": (wrong(down_bias=torch.zeros(3, 8)), ValueError, r"must be \(3, 16\)"),
    "bias-dtype": (wrong(gate_up_bias=torch.zeros(3, 16).half()), TypeError, "got torch.float16"),
    "device": (wrong(w_down=torch.zeros(3, 16, 8, device="meta")), ValueError, "got meta"),
    "out": (wrong(out=torch.zeros(4, 8)), ValueError, r"got \(4, 8\)"),
    "not-gated": (
        wrong(w_gate_up=torch.zeros(3, 8, 16), gated=False, activation_limit=1.0),
        ValueError,
        "activation_limit=1.0",
    ),
    "activation": (wrong(activation="mish"), ValueError, "got 'mish'"),
    "backend": (wrong(backend="gpu"), ValueError, "got 'gpu'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_expected_and_got(name):
    (tensors, options), error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        fused_experts(*tensors, **options)


def as_op(spec):
    """A spec as the operator takes it, without scales."""
    return *spec.op_options, None, None


WRONG_TENSORS = [
    name for name, ((_, more), *_) in ERRORS.items() if more.keys() <= {"gate_up_bias", "down_bias"}
]


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_the_quick_way_refuses_a_wrong_call_by_value(name):
    (tensors, biases), error, message = ERRORS[name]
    quick = BACKENDS["cpu"].quick()
    flat = biases.get("gate_up_bias"), biases.get("down_bias"), *as_op(DEFAULT_SPEC)
    assert quick(*tensors, *flat) is None
    fused_experts(*make_case(2, 1, 2, 8, 4).tensors)  # from here on the quick way is tried first
    with pytest.raises(error, match=message):
        fused_experts(*tensors, **biases)


@pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
def test_the_quick_way_is_the_back_end():
    case = make_case(7, 2, 4, 32, 16, torch.bfloat16, bias=True, interleaved=True)
    x, weights, routing, spec = case.as_run()
    flat = weights.gate_up_bias, weights.down_bias, *as_op(spec)
    result = BACKENDS["cpu"].quick()(*case.tensors, *flat)
    assert torch.equal(result, BACKENDS["cpu"].load()(x, weights, routing, spec))


def test_only_an_invariant_back_end_has_a_quick_way():
    """It is not told whether rows must be independent of the batch."""
    assert all(backend.invariant for backend in BACKENDS.values() if backend.quick)

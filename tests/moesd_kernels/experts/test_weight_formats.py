"""Quantised weights are, to the bit, the numbers that they stand for, on every back-end."""

from __future__ import annotations

import logging

import pytest
import torch
from support.formats import MIXTURES, QUANTISED, quantised_case, stored_weight
from support.oracle import check_experts, make_case

from moesd_kernels import available_backends, fused_experts
from moesd_kernels.experts import backends
from moesd_kernels.experts.backends import BACKENDS, CallTraits, choose_backend

HERE = [
    name
    for name, reason in available_backends().items()
    if reason is None and BACKENDS[name].devices in (None, frozenset({"cpu"}))
]
PAIRS = [(b, name) for b in HERE for name in QUANTISED if name in BACKENDS[b].formats]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {
    "plain": {},
    "gpt-oss": {
        "bias": True,
        "interleaved": True,
        "activation_limit": 7.0,
        "activation_alpha": 1.702,
    },
    "not-gated": {"gated": False, "activation": "relu2", "bias": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "name"), PAIRS)
def test_equal_to_plain_weights_of_the_same_values(backend, name, dtype, variant):
    """The sizes leave rests: I and H are multiples of 256, the least that every format takes."""
    stored, plain = quantised_case(name, 7, 2, 3, 256, 256, dtype=dtype, **VARIANTS[variant])
    actual = fused_experts(*stored.tensors, **stored.options, backend=backend)
    expected = fused_experts(*plain.tensors, **plain.options, backend=backend)
    assert torch.equal(actual, expected) and actual.isfinite().all()
    check_experts(actual, plain, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "down"), MIXTURES)
@pytest.mark.parametrize("backend", [b for b in HERE if BACKENDS[b].formats > {"q6_k"}])
def test_two_formats_in_one_layer(backend, name, down, dtype):
    stored, plain = quantised_case(
        name, 7, 2, 3, 256, 512, down=down, dtype=dtype, **VARIANTS["gpt-oss"]
    )
    whole = fused_experts(*stored.tensors, **stored.options, backend=backend)
    assert torch.equal(whole, fused_experts(*plain.tensors, **plain.options, backend=backend))
    check_experts(whole, plain, f"{name} {down}")
    if backend != "cpu":
        return
    x, *weights, ids, pair_weights = stored.tensors
    for t in range(7):
        rows = slice(t, t + 1)
        alone = fused_experts(
            x[rows], *weights, ids[rows], pair_weights[rows], **stored.options, backend=backend
        )
        assert torch.equal(alone[0], whole[t])


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("backend", [backend for backend, name in PAIRS if name == "int8"])
def test_the_group_follows_from_the_shapes(backend, name, group):
    stored, plain = quantised_case(name, 5, 2, 3, 128, 256, group=group)
    actual = fused_experts(*stored.tensors, **stored.options, backend=backend)
    assert torch.equal(actual, fused_experts(*plain.tensors, **plain.options, backend=backend))


@pytest.mark.parametrize("backend", [backend for backend, name in PAIRS if name == "fp8_block"])
def test_fp8_sizes_that_its_squares_do_not_divide(backend):
    stored, plain = quantised_case("fp8_block", 5, 2, 3, 200, 72)
    actual = fused_experts(*stored.tensors, **stored.options, backend=backend)
    assert torch.equal(actual, fused_experts(*plain.tensors, **plain.options, backend=backend))


@pytest.mark.parametrize("name", ["int4", "q4_k"])
def test_the_hidden_states_may_need_gradients(name):
    """Adapters before frozen quantised experts: the back-end that can differentiate serves them."""
    stored, plain = quantised_case(name, 4, 2, 3, 256, 256)
    grads = []
    for case in (stored, plain):
        x = case.x.clone().requires_grad_()
        fused_experts(x, *case.tensors[1:], **case.options).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("name", "down"), [("int8", None), ("mxfp4", None), ("q8_0", None), ("q4_0", "plain")]
)
@torch.no_grad()
def test_compiles(name, down):
    stored, _ = quantised_case(name, 5, 2, 3, 64, 64, down=down)

    def layer(x, ids, weights):
        return fused_experts(x, *stored.tensors[1:3], ids, weights, **stored.options)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for T in (5, 9):
        x, _, _, ids, weights = make_case(T, 2, 3, 64, 64).tensors
        assert torch.equal(compiled(x, ids, weights), layer(x, ids, weights))


def test_a_back_end_that_lacks_the_format_says_so(monkeypatch, caplog):
    limited = {
        name: backend if name in ("torch", "reference") else plain_only(backend)
        for name, backend in BACKENDS.items()
    }
    monkeypatch.setattr(backends, "BACKENDS", limited)
    traits = CallTraits("cpu", torch.float32, formats=("int4", "int4"))
    uncached = choose_backend.__wrapped__
    with pytest.raises(RuntimeError, match="reads weights as plain, got int4"):
        uncached("cpu", traits)
    with pytest.raises(RuntimeError, match="reads weights as plain, got plain and int4"):
        uncached("cpu", traits._replace(formats=("plain", "int4")))
    with caplog.at_level(logging.INFO, logger="moesd_kernels"):
        assert uncached("auto", traits).name == "torch"
    assert "with int4 weights use backend 'torch'" in caplog.text
    assert "cpu: it reads weights as plain, got int4" in caplog.text


def plain_only(backend):
    from dataclasses import replace

    return replace(backend, formats=backends.PLAIN)


def test_errors_say_expected_and_got():
    stored, _ = quantised_case("int8", 4, 2, 3, 64, 96)
    x, w_gate_up, w_down, ids, weights = stored.tensors

    def raises(error, message, gate_up=w_gate_up, down=w_down, **changes):
        with pytest.raises(error, match=message):
            fused_experts(x, gate_up, down, ids, weights, **stored.options | changes)

    raises(
        TypeError, "w_gate_up in format int8 must be torch.int8, got torch.uint8", w_gate_up.byte()
    )
    raises(TypeError, "w_down in format int8 needs a scale, got None", down_scale=None)
    raises(ValueError, r"must be \(3, 192, 64\)", w_gate_up[:2])
    raises(ValueError, r"w_down has H = 63", down=w_down[:, 1:])
    raises(ValueError, "multiple of 32, got 90", down=w_down[..., 6:])
    raises(
        *(ValueError, r"scale of w_down in format int8 must be \(3, 64, 3\)"),
        down_scale=stored.options["down_scale"][..., 1:],
    )
    raises(TypeError, "weights must have the dtype", weight_format="plain")
    raises(TypeError, "weights must have the dtype", down_format="plain")
    raises(
        *(ValueError, "w_down in format q8_0 needs a depth .* of 32, got 90"),
        down=w_down.byte(),
        down_format="q8_0",
        down_scale=None,
    )
    with pytest.raises(TypeError, match="w_down in format plain takes no scale"):
        plain = make_case(4, 2, 3, 64, 96)
        fused_experts(*plain.tensors, down_scale=torch.ones(1))


def test_the_helper_makes_weights_of_a_layers_size():
    from moesd_kernels.formats import dequantize

    for name in QUANTISED:
        values = dequantize(*stored_weight(name, 64, 256), name, torch.float32)
        assert 0.3 < values.std() * 16 < 3 and values.mean().abs() * 16 < 0.5, name

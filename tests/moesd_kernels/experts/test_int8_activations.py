"""Experts whose activations are rounded to eight bits: their definition, and rows on their own."""

from __future__ import annotations

import pytest
import torch
from support.formats import INTEGERS, QUANTISED, quantised_case

from moesd_kernels import ExpertsSpec, fused_experts
from moesd_kernels.dense import ops
from moesd_kernels.experts.backends import CallTraits, choose_backend

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))

OTHERS = [name for name in QUANTISED if name not in INTEGERS]
GPT_OSS = {
    "bias": True,
    "interleaved": True,
    "activation_limit": 7.0,
    "activation_alpha": 1.702,
}
VARIANTS = {
    "plain": {},
    "gpt-oss": GPT_OSS,
    "not-gated": {"gated": False, "activation": "relu2", "bias": True},
}


def rounded(case, backend="cpu", rows=slice(None)):
    x, *weights, ids, pair_weights = case.tensors
    options = case.options | {"int8_activations": True}
    return fused_experts(
        x[rows], *weights, ids[rows], pair_weights[rows], **options, backend=backend
    )


@pytest.mark.parametrize("tokens", [1, 4, 5, 13, 16, 17, 140])
@pytest.mark.parametrize("name", INTEGERS)
def test_one_expert_is_two_linear_layers_to_the_bit(name, tokens):
    case, _ = quantised_case(name, tokens, 1, 1, 512, 768, dtype=torch.float32)
    x, gate_up, down, ids, _ = case.tensors
    scales = case.options.get("gate_up_scale"), case.options.get("down_scale")
    options = {"weight_format": name, "int8_activations": True}
    up_scale, down_scale = (None if scale is None else scale[0] for scale in scales)
    gate, up = ops.linear(x, gate_up[0], scale=up_scale, **options).chunk(2, dim=-1)
    inner = ops.act_and_mul(gate.contiguous(), up.contiguous(), "silu")
    expected = ops.linear(inner, down[0], scale=down_scale, **options)
    out = fused_experts(
        *(x, gate_up, down, ids, torch.ones(tokens, 1)), **case.options, int8_activations=True
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", INTEGERS)
def test_the_definition(name, variant, dtype):
    """A sum that lies at the edge between two codes may fall on either side: such a number moves by
    a 254th of its group's largest, a small part of a row.
    """
    case, _ = quantised_case(name, 45, 2, 5, 256, 512, dtype=dtype, **VARIANTS[variant])
    out, exact = rounded(case).double(), fused_experts(*case.tensors, **case.options).double()
    for backend in ("torch", "reference"):
        expected = rounded(case, backend).double()
        error = (out - expected).norm() / expected.norm()
        assert error < 1e-3 + torch.finfo(dtype).eps, backend
        assert error < 0.3 * (exact - expected).norm() / expected.norm()  # the rounding is there


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", INTEGERS)
def test_rows_do_not_depend_on_the_batch(name, variant):
    """Experts get from none to more than sixteen of the rows: every way of multiplying."""
    case, _ = quantised_case(name, 40, 2, 6, 256, 256, dtype=torch.bfloat16, **VARIANTS[variant])
    whole = rounded(case)
    for rows in (slice(0, 1), slice(3, 8), slice(8, 25), slice(39, 40)):
        assert torch.equal(rounded(case, rows=rows), whole[rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(rounded(case), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "down"), [*((n, None) for n in OTHERS), ("q4_k", "plain")])
def test_weights_that_are_not_integers_keep_their_activations(name, down):
    case, _ = quantised_case(name, 9, 2, 3, 256, 256, down=down, dtype=torch.bfloat16)
    assert torch.equal(rounded(case), fused_experts(*case.tensors, **case.options, backend="cpu"))


def test_what_is_not_finite_stays_so():
    case, _ = quantised_case("int4", 6, 2, 3, 256, 256, dtype=torch.float32)
    x, *rest = case.tensors
    clean = rounded(case)
    x = x.clone()
    x[1, 40], x[4, 255] = float("nan"), float("inf")
    out = fused_experts(x, *rest, **case.options, int8_activations=True, backend="cpu")
    assert not out[[1, 4]].isfinite().any()
    assert torch.equal(out[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


def test_spec():
    assert not ExpertsSpec(weight_format="int4").rounds_activations
    assert ExpertsSpec(weight_format="int4", int8_activations=True).rounds_activations
    assert not ExpertsSpec(int8_activations=True).rounds_activations
    mixture = ExpertsSpec(weight_format="q4_k", down_format="plain", int8_activations=True)
    assert not mixture.rounds_activations


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_back_ends_of_gpus_refuse(backend):
    traits = CallTraits("cuda", torch.bfloat16, rounding=True)
    with pytest.raises(RuntimeError, match="it does not round activations to eight bits"):
        choose_backend(backend, traits)

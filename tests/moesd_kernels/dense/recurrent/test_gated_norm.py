"""The gated RMS norm: transformers' modules, the reference, the C++ operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.oracle import assert_as_accurate
from support.recurrent.gated_norms import EPS, GATED_NORMS, gated_norm

from moesd_kernels.dense import ops, recurrent
from moesd_kernels.dense.recurrent.gated_norm import gated_rms_norm as reference

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
NATIVE = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))


@DTYPES
@pytest.mark.parametrize("name", GATED_NORMS)
def test_the_reference_is_the_module(name, dtype):
    module, x, gate = gated_norm(name, dtype)
    out = reference(x, gate, module.weight, EPS, **GATED_NORMS[name][1])
    torch.testing.assert_close(out, module(x, gate), rtol=2e-7, atol=1e-7)


@NATIVE
@DTYPES
@pytest.mark.parametrize("name", GATED_NORMS)
def test_as_accurate_as_the_reference(name, dtype):
    module, x, gate = gated_norm(name, dtype)
    rule, weight = GATED_NORMS[name][1], module.weight
    out = recurrent.gated_rms_norm(x, gate, weight, EPS, **rule)
    exact = reference(*(t.double() for t in (x, gate, weight)), EPS, **rule)
    assert_as_accurate(out, reference(x, gate, weight, EPS, **rule), exact, name=name)
    sliced = F.pad(gate, (3, 1))[..., 3:-1]
    assert torch.equal(recurrent.gated_rms_norm(x, sliced, weight, EPS, **rule), out)
    alone = recurrent.gated_rms_norm(x[1, 2], gate[1, 2], weight, EPS, **rule)
    assert torch.equal(alone, out[1, 2])


@NATIVE
@DTYPES
def test_one_weight_of_every_group(dtype):
    module, x, gate = gated_norm("qwen3_next", dtype)
    shared = recurrent.gated_rms_norm(x, gate, module.weight[:10], EPS, group=10)
    each = recurrent.gated_rms_norm(x, gate, module.weight[:10].repeat(4), EPS, group=10)
    assert torch.equal(shared, each)
    heads = (tensor.unflatten(-1, (4, 10)) for tensor in (x, gate))
    assert torch.equal(
        recurrent.gated_rms_norm(*heads, module.weight[:10], EPS, group=10).flatten(-2), shared
    )


@NATIVE
def test_wrong_arguments_are_refused():
    module, x, gate = gated_norm("qwen3_next", torch.float32)
    w = module.weight
    calls = [
        (r"gate must be \[2, 3, 40\], got", ValueError, (x, gate[..., 1:], w), 40, "silu"),
        ("gate must be Float like x, got Half", TypeError, (x, gate.half(), w), 40, "silu"),
        (r"w must be \[40\], got \[39\]", ValueError, (x, gate, w[1:]), 40, "silu"),
        ("w must be Float like x", TypeError, (x, gate, w.bfloat16()), 40, "silu"),
        ("the width of x must be a multiple of the group 7", ValueError, (x, gate, w), 7, "silu"),
        (r"group must be in \[1, 16384\], got 0", ValueError, (x, gate, w), 0, "silu"),
        ("activation must be silu or sigmoid, got relu", ValueError, (x, gate, w), 40, "relu"),
    ]
    for message, error, tensors, group, activation in calls:
        with pytest.raises(error, match=message):
            recurrent.gated_rms_norm(*tensors, EPS, group=group, activation=activation)
    assert recurrent.gated_rms_norm(x[:0], gate[:0], w, EPS, group=40).shape == (0, 3, 40)


@NATIVE
def test_op_contract():
    module, x, gate = gated_norm("zamba2", torch.float32)
    torch.library.opcheck(
        torch.ops.moesd.gated_rms_norm.default,
        (x, gate, module.weight, EPS, 20, True, True, "silu"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )

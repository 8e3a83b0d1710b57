"""MOESD_CPU_ISA: every set this processor has agrees with PyTorch; others are refused by name.

Weights of every format have on every set the bits of plain weights of the same values, and with
activations of eight bits their definition.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moesd_kernels.dense import ops

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))

# The variable is read once per process, so each value needs its own.
SCRIPT = """
import torch
from moesd_kernels import fused_experts
from moesd_kernels.dense import ops
assert ops.isa() == {isa!r}
torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    x, w = torch.randn(5, 70).to(dtype), torch.randn(9, 70).to(dtype)
    exact = x.double() @ w.double().T
    budget = 2 * ((x @ w.T).double() - exact).abs().max() + 1e-6
    assert (ops.linear(x, w).double() - exact).abs().max() <= budget, dtype
    ids, weights = torch.tensor([[0, 1]]).expand(5, 2), torch.ones(5, 2)
    w1, w2 = torch.randn(2, 40, 70).to(dtype), torch.randn(2, 70, 20).to(dtype)
    whole = fused_experts(x, w1, w2, ids, weights, backend="cpu")
    alone = fused_experts(x[3:4], w1, w2, ids[:1], weights[:1], backend="cpu")
    assert torch.equal(alone[0], whole[3])
    expected = sum(
        (torch.nn.functional.silu(g) * u) @ d.double().T
        for (g, u), d in [((x.double() @ w1[e].double().T).chunk(2, -1), w2[e]) for e in (0, 1)]
    )
    relative = (whole.double() - expected).abs().max() / expected.abs().max()
    assert relative < 4 * torch.finfo(dtype).eps, (dtype, relative)
import sys
sys.path.insert(0, {tests!r})
from support.formats import (
    INTEGERS, MIXTURES, QUANTISED, check_int8_product, quantised_case, stored_weight
)
from moesd_kernels.formats import WEIGHT_FORMATS, dequantize
torch.set_num_threads(1)
# A short depth, one of several blocks that end within a run, and for those that allow it, odd ones.
for name in QUANTISED:
    depths = [256, 1792, *([800] if WEIGHT_FORMATS[name].block <= 32 else [])]
    for depth in depths + [33, 1025] * (name == "fp8_block"):
        w, scale = stored_weight(name, 37, depth, group=32)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.randn(13, depth).to(dtype)
            plain = ops.linear(x, dequantize(w, scale, name, dtype))
            for rows in (x, x[:3], x[4:5]):
                out = ops.linear(rows, w, scale=scale, weight_format=name)
                start = 4 if len(rows) == 1 else 0
                assert torch.equal(out, plain[start : start + len(rows)]), (name, depth, dtype)
# Every code of MXFP4 with every exponent.
codes = (torch.arange(16) | torch.arange(16).roll(5) << 4).byte().expand(256, 16).contiguous()
exponents = torch.arange(256).byte()[:, None].contiguous()
for dtype in (torch.bfloat16, torch.float32):
    x = torch.eye(32, dtype=dtype)
    out = ops.linear(x, codes, scale=exponents, weight_format="mxfp4")
    plain = ops.linear(x, dequantize(codes, exponents, "mxfp4", dtype))
    torch.testing.assert_close(out, plain, rtol=0, atol=0, equal_nan=True)
for name in INTEGERS:
    for depth in (256, 2304):
        w, scale = stored_weight(name, 37, depth)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.randn(33, depth).to(dtype)
            options = dict(scale=scale, weight_format=name, int8_activations=True)
            whole = ops.linear(x, w, **options)
            check_int8_product(whole, x, w, scale, name)
            for rows in (slice(3), slice(4, 5), slice(5, 26), slice(16, 33)):
                assert torch.equal(ops.linear(x[rows], w, **options), whole[rows]), (name, rows)
for name, down in [(name, None) for name in QUANTISED] + MIXTURES:
    sizes, options = (13, 2, 3, 256, 256), dict(dtype=torch.bfloat16, bias=True, interleaved=True)
    stored, plain = quantised_case(name, *sizes, down=down, **options)
    out = fused_experts(*stored.tensors, **stored.options, backend="cpu")
    expected = fused_experts(*plain.tensors, **plain.options, backend="cpu")
    assert torch.equal(out, expected), (name, down)
from moesd_kernels.dense import recurrent
from moesd_kernels.dense.recurrent.convolution import short_convolution
from support.recurrent import CONVOLUTIONS, all_calls, convolution_call
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for call in all_calls(dtype):
        call.check(getattr(recurrent, call.name))
        out, states = call.run(getattr(recurrent, call.name))
        alone = call.tokens(0, 0, 1, 1).run(getattr(recurrent, call.name))[0]
        assert torch.equal(alone[0, 0], out[0, 0]), (call.name, dtype)
    for sizes in CONVOLUTIONS:
        arguments = *convolution_call(*sizes, dtype), "silu"
        error = recurrent.short_convolution(*arguments) - short_convolution(*arguments)
        assert error.abs().max() <= 16 * torch.finfo(dtype).eps, (sizes, dtype)
print("ok")
"""
# Every output of these calls, in hexadecimal digits that stand for its bits.
BITS = """
import sys
sys.path.insert(0, {tests!r})
import hashlib, torch
from support.formats import INTEGERS, stored_weight
from moesd_kernels.dense import ops
assert ops.isa() == {isa!r}
x = torch.randn(130, 2304, generator=torch.Generator().manual_seed(0))
for name in INTEGERS:
    w, scale = stored_weight(name, 37, 2304)
    for tokens in (1, 4, 5, 16, 17, 130):
        options = dict(scale=scale, weight_format=name, int8_activations=True)
        out = ops.linear(x[:tokens], w, **options)
        print(name, tokens, hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""
TESTS = str(Path(__file__).resolve().parents[1])


def run(isa: str, script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script.format(isa=isa, tests=TESTS)],
        env=os.environ | {"MOESD_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_each_instruction_set(isa):
    done = run(isa)
    if "is not supported by this processor" in done.stderr:
        assert done.returncode != 0
        pytest.skip(f"{isa} is not supported by this processor")
    if "must be one of" in done.stderr:
        pytest.skip(f"{isa} is not built for this architecture")
    assert done.stdout == "ok\n", done.stderr


def test_sums_on_tiles_have_the_bits_of_those_in_vectors():
    """The integers of a run are exact, and their scaled sums are added by the same operations."""
    tiles, vectors = (run(isa, BITS) for isa in ("amx", "avx512_bf16"))
    for done in (tiles, vectors):
        if re.search("is not supported by this processor|must be one of", done.stderr):
            pytest.skip("amx or avx512_bf16 cannot run here")
    assert tiles.returncode == vectors.returncode == 0, tiles.stderr + vectors.stderr
    assert tiles.stdout == vectors.stdout and tiles.stdout.count("\n") == 7 * 6


def test_unknown_name():
    done = run("sse9")
    assert "MOESD_CPU_ISA must be one of" in done.stderr and "got sse9" in done.stderr

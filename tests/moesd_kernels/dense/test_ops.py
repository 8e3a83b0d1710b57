"""The dense ops on the CPU: fp64 oracle, row invariance, and equality with the ops they join."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from support.oracle import assert_as_accurate

from moesd_kernels.dense import ops
from moesd_kernels.experts.spec.activations import FUNCTIONS

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)


def randn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transformers_norm(x, w, eps):
    wide = x.float() if x.dtype != torch.float64 else x
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return w * wide.to(x.dtype)


# One row and column; a depth below a vector; rows not a multiple of the tile; several token chunks;
# several blocks of the depth, for one tile of rows and for many; depths that are transposed, with
# one, two and three blocks of sixteen outputs; many tokens for few outputs.
LINEAR_SHAPES = [
    *[(1, 1, 1), (3, 7, 5), (4, 64, 130), (70, 1040, 67), (13, 256, 1024), (0, 8, 8)],
    *[(2, 3333, 37), (20, 3333, 37), (17, 250, 33), (9, 48, 16), (7, 31, 32), (150, 96, 40)],
]


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear(shape, bias, dtype):
    T, K, N = shape
    x, w = randn(T, K, dtype=dtype), randn(N, K, dtype=dtype, seed=1)
    b = randn(N, dtype=dtype, seed=2) if bias else None
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert_as_accurate(ops.linear(x, w, b), F.linear(x, w, b), exact, name="linear")


@DTYPES
@pytest.mark.parametrize("features", [20, 150])
@pytest.mark.parametrize("depth", [50, 256, 328, 3333])
def test_linear_rows_do_not_depend_on_the_batch(depth, features, dtype, threads):
    x, w = randn(64, depth, dtype=dtype), randn(features, depth, dtype=dtype, seed=1)
    whole = ops.linear(x, w)
    for count in (1, 2):
        threads(count)
        for T in range(1, 65):
            assert torch.equal(ops.linear(x[64 - T :], w), whole[64 - T :]), (T, count)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        assert torch.equal(ops.linear(x[order], w), whole[order])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 64), (5, 37), (0, 16)], ids=str)
def test_rms_norm(shape, dtype):
    x, w = randn(*shape, dtype=dtype) * 3, randn(shape[-1], dtype=dtype, seed=1)
    exact = transformers_norm(x.double(), w.double(), 1e-6)
    actual = ops.rms_norm(x, w, 1e-6)
    assert_as_accurate(actual, transformers_norm(x, w, 1e-6), exact, name="rms_norm")


# What transformers' classes compute, in their own words: gpt-oss and Gemma.
@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 64), (5, 37)], ids=str)
def test_rms_norm_rounded_once(shape, offset, dtype):
    x, w = randn(*shape, dtype=dtype) * 3, randn(shape[-1], dtype=dtype, seed=1)
    wide = x.float()
    wide = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    actual = ops.rms_norm(x, w, 1e-6, offset=offset, cast_first=False)
    ulp = torch.finfo(dtype).eps
    expected = (wide * (w.float() + offset)).to(dtype)
    torch.testing.assert_close(actual, expected, rtol=max(1e-6, ulp), atol=1e-7)
    assert dtype == torch.float32 or (actual != expected).float().mean() < 0.01


def test_rms_norm_rows_do_not_depend_on_the_batch():
    x, w = randn(33, 104, dtype=torch.bfloat16), randn(104, dtype=torch.bfloat16, seed=1)
    whole = ops.rms_norm(x, w, 1e-5)
    for t in range(33):
        assert torch.equal(ops.rms_norm(x[t], w, 1e-5), whole[t])


@DTYPES
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_act_and_mul(activation, dtype):
    act = FUNCTIONS[activation]
    gate, up = randn(3, 5, 37, dtype=dtype) * 3, randn(3, 5, 37, dtype=dtype, seed=1)
    actual = ops.act_and_mul(gate, up, activation)
    exact = act(gate.double()) * up.double()
    assert_as_accurate(actual, act(gate) * up, exact, name="act_and_mul")
    assert ops.act_and_mul(gate[:0], up[:0], activation).shape == (0, 5, 37)


@DTYPES
def test_act_and_mul_rows_do_not_depend_on_the_batch(dtype, threads):
    gate, up = randn(600, 37, dtype=dtype), randn(600, 37, dtype=dtype, seed=1)
    whole = ops.act_and_mul(gate, up, "silu")
    for count in (1, 2):
        threads(count)
        for T in (1, 2, 3, 111, 599):
            assert torch.equal(ops.act_and_mul(gate[-T:], up[-T:], "silu"), whole[-T:])


@DTYPES
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 8, 1), (9, 4, 64, 60), (5, 2, 33, 7), (4, 8, 16, 8)])
def test_router(shape, renormalize, dtype):
    T, K, H, E = shape
    x, w = randn(T, H, dtype=dtype), randn(E, H, dtype=dtype, seed=1) / H**0.5
    logits, weights, ids = ops.softmax_topk_router(x, w, K, renormalize)
    exact = x.double() @ w.double().T
    assert_as_accurate(logits, F.linear(x, w), exact, name="logits")
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    probabilities = logits.float().softmax(-1)
    expected = probabilities.gather(1, ids)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-7)
    kept = probabilities.topk(K, dim=-1).values
    torch.testing.assert_close(probabilities.gather(1, ids), kept, rtol=0, atol=0)
    assert all(len(set(row)) == K for row in ids.tolist())


def test_router_breaks_ties_by_the_lower_id():
    x, w = torch.ones(1, 4), torch.ones(6, 4)
    w[4] = 2
    assert ops.softmax_topk_router(x, w, 3, True)[2].tolist() == [[4, 0, 1]]


def test_router_rows_do_not_depend_on_the_batch():
    x, w = randn(40, 64, dtype=torch.bfloat16), randn(33, 64, dtype=torch.bfloat16, seed=1)
    whole = ops.softmax_topk_router(x, w, 4, True)
    for t in range(40):
        alone = ops.softmax_topk_router(x[t : t + 1], w, 4, True)
        assert all(torch.equal(a[0], b[t]) for a, b in zip(alone, whole, strict=True))


# A width below a vector, one with a rest, whole vectors over several threads' rows.
@DTYPES
@pytest.mark.parametrize("shape", [(1, 3), (5, 40), (70, 256)])
def test_add_rms_norm_is_an_addition_and_a_norm(dtype, shape):
    x, delta, w = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, shape, shape[1:])))
    total, normed = ops.add_rms_norm(x, delta, w, 1e-6)
    assert torch.equal(total, x + delta)
    assert torch.equal(normed, ops.rms_norm(x + delta, w, 1e-6))


# Head dimensions below a vector, with a rest, and whole; grouped and single heads.
@DTYPES
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("T, q_heads, kv_heads, D", [(1, 1, 1, 6), (5, 4, 2, 40), (70, 8, 2, 64)])
def test_rope_to_cache_is_norms_rotation_and_a_scatter(dtype, norms, T, q_heads, kv_heads, D):
    rows, heads = 3 * T + 1, q_heads + kv_heads
    qkv = randn(T, (heads + kv_heads) * D, dtype=dtype)
    cos, sin = randn(T, D, dtype=dtype, seed=1), randn(T, D, dtype=dtype, seed=2)
    weights = [(randn(D, dtype=dtype, seed=seed), 1e-5) for seed in (3, 4)] if norms else [None] * 2
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(5))[:T]
    keys = torch.full((rows, kv_heads * D), torch.nan, dtype=dtype)
    values = keys.clone()
    q = ops.rope_to_cache(qkv, cos, sin, *weights, index, keys, values)

    qk = qkv[:, : heads * D].view(T, heads, D)
    if norms:
        parts = qk.split([q_heads, kv_heads], dim=1)
        qk = torch.cat([ops.rms_norm(p, *w) for p, w in zip(parts, weights, strict=True)], 1)
    turned = torch.cat([-qk[..., D // 2 :], qk[..., : D // 2]], -1)
    qk = qk * cos[:, None] + turned * sin[:, None]
    assert torch.equal(q, qk[:, :q_heads])
    assert torch.equal(keys[index], qk[:, q_heads:].flatten(1))
    assert torch.equal(values[index], qkv[:, heads * D :])
    others = torch.ones(rows, dtype=torch.bool).index_fill(0, index, False)
    assert keys[others].isnan().all() and values[others].isnan().all()


def test_rope_to_cache_refuses():
    qkv, table, index = torch.zeros(2, 24), torch.zeros(2, 6), torch.tensor([0, 3])
    keys, values = torch.zeros(4, 6), torch.zeros(4, 6)
    call = lambda **changed: ops.rope_to_cache(
        *({"qkv": qkv, "cos": table, "sin": table, "q_norm": None, "k_norm": None, "index": index}
          | {"keys": keys, "values": values} | changed).values()
    )  # fmt: skip
    call()
    for changed, error, message in (
        ({"index": torch.tensor([0, 4])}, IndexError, r"index must be in \[0, 4\), got 4"),
        ({"index": torch.tensor([-1, 0])}, IndexError, r"index must be in \[0, 4\), got -1"),
        ({"index": index.int()}, TypeError, "index must be int64, got Int"),
        ({"sin": torch.zeros(2, 4)}, ValueError, r"sin must be \[2, 6\], got \[2, 4\]"),
        ({"values": torch.zeros(3, 6)}, ValueError, r"values must be \[4, 6\], got \[3, 6\]"),
        ({"cos": table.bfloat16()}, TypeError, "cos must be Float like qkv, got BFloat16"),
        ({"qkv": torch.zeros(24, 2).T}, ValueError, "qkv must be contiguous"),
        ({"k_norm": (torch.ones(5), 1e-6)}, ValueError, r"k_norm must be \[6\], got \[5\]"),
        ({"cos": torch.zeros(2, 3), "sin": torch.zeros(2, 3)}, ValueError, "must be even"),
    ):
        with pytest.raises(error, match=message):
            call(**changed)


MORE_THREADS_THAN_CORES = """
import os, sys, torch
from moesd_kernels.dense import ops
x, w = torch.randn(64, 256), torch.randn(512, 256)
torch.set_num_threads(1)
expected, before = ops.linear(x, w), len(os.listdir("/proc/self/task"))
torch.set_num_threads(int(sys.argv[1]))
actual, after = ops.linear(x, w), len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
assert torch.equal(actual, expected)
assert after <= before + len(os.sched_getaffinity(0)), (before, after)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.parametrize("count", [64, 100_000])
def test_no_more_threads_than_cores_are_woken(count):
    """Others could only take turns; a hundred thousand would end the process."""
    command = [sys.executable, "-c", MORE_THREADS_THAN_CORES, str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_schemas_and_fakes():
    x, w = randn(3, 8, dtype=torch.bfloat16), randn(5, 8, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.moesd.linear.default, (x, w, None))
    torch.library.opcheck(torch.ops.moesd.rms_norm.default, (x, w[0], 1e-6))
    torch.library.opcheck(torch.ops.moesd.rms_norm.default, (x, w[0], 1e-6, 1.0, False))
    torch.library.opcheck(torch.ops.moesd.softmax_topk_router.default, (x, w, 2, True))
    torch.library.opcheck(torch.ops.moesd.act_and_mul.default, (x, x, "silu"))
    torch.library.opcheck(torch.ops.moesd.add_rms_norm.default, (x, x, w[0], 1e-6))
    heads = (randn(3, 8, dtype=torch.bfloat16), x[:, :2].contiguous(), x[:, :2].contiguous())
    index, slabs = torch.arange(3), (torch.zeros(4, 2).bfloat16(), torch.zeros(4, 2).bfloat16())
    arguments = (*heads, None, 0.0, None, 0.0, index, 2, 1, *slabs)
    torch.library.opcheck(torch.ops.moesd.rope_to_cache.default, arguments)


def test_errors():
    x, w = torch.zeros(3, 8), torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"w must be \[N, 8\], got \[5, 7\]"):
        ops.linear(x, w[:, :7])
    with pytest.raises(TypeError, match="w must be Float like x, got BFloat16"):
        ops.linear(x, w.bfloat16())
    with pytest.raises(ValueError, match="w must be contiguous"):
        ops.linear(x, torch.zeros(8, 5).T)
    with pytest.raises(ValueError, match=r"bias must be \[5\], got \[4\]"):
        ops.linear(x, w, torch.zeros(4))
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16, got Double"):
        ops.linear(x.double(), w.double())
    with pytest.raises(ValueError, match=r"w must be \[8\], got \[5\]"):
        ops.rms_norm(x, torch.ones(5), 1e-6)
    with pytest.raises(ValueError, match=r"delta must be \[3, 8\] like x, got \[5, 8\]"):
        ops.add_rms_norm(x, w, torch.ones(8), 1e-6)
    with pytest.raises(TypeError, match="delta must be Float like x, got BFloat16"):
        ops.add_rms_norm(x, x.bfloat16(), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match=r"up must be \[3, 8\] like gate, got \[5, 8\]"):
        ops.act_and_mul(x, w, "silu")
    with pytest.raises(ValueError, match=r"activation must be silu.*got tanh"):
        ops.act_and_mul(x, x, "tanh")
    with pytest.raises(ValueError, match=r"top_k must be in \[1, 5\], got 6"):
        ops.softmax_topk_router(x, w, 6, True)

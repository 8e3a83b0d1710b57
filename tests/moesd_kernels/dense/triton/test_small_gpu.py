"""Norms, rope, activation, router and argmax on a GPU: the C++ operators' bits, graphs.

Written without a GPU at hand; the same kernels run interpreted in ``interpreted/``.
"""

import pytest
import torch
from support.oracle import assert_as_accurate

from moesd_kernels.dense import ops
from moesd_kernels.experts.spec.activations import FUNCTIONS
from moesd_kernels.experts.triton import unavailable_reason

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"triton: {unavailable_reason()}"),
    pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable())),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
FIRST = pytest.mark.first


def whole_numbers(*shape, dtype):
    """Their squares have the same sum in every order."""
    return torch.randint(-3, 4, shape).to(dtype)


def on_gpu(function, *arguments):
    """Results on the CPU of a call with its tensors on the GPU."""
    moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
    results = function(*moved)
    return [x.cpu() for x in (results if isinstance(results, tuple) else (results,))]


@FIRST
@DTYPES
@pytest.mark.parametrize("H", [896, 3584, 20000, 33])
def test_norms_round_as_the_operators(H, dtype):
    from moesd_kernels.dense.triton.norm_kernel import add_rms_norm, rms_norm

    x, delta = whole_numbers(2, 5, H, dtype=dtype)
    w = torch.randn(H).to(dtype)
    for offset, cast_first in ((0.0, True), (1.0, False)):
        expected = ops.rms_norm(x, w, 1e-6, offset=offset, cast_first=cast_first)
        assert torch.equal(on_gpu(rms_norm, x, w, 1e-6, offset, cast_first)[0], expected)
    actual, expected = on_gpu(add_rms_norm, x, delta, w, 1e-6), ops.add_rms_norm(x, delta, w, 1e-6)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    # A row alone, where sums do depend on their order.
    x = torch.randn(5, H).to(dtype).cuda()
    assert torch.equal(rms_norm(x, w.cuda(), 1e-6)[3:4], rms_norm(x[3:4], w.cuda(), 1e-6))


@FIRST
@DTYPES
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("T, q_heads, kv_heads, D", [(5, 28, 4, 128), (3, 14, 2, 64), (2, 3, 1, 6)])
def test_rope_rounds_as_the_operator(T, q_heads, kv_heads, D, norms, dtype):
    from moesd_kernels.dense.triton.rope_kernel import rope_to_cache

    qkv = whole_numbers(T, (q_heads + 2 * kv_heads) * D, dtype=dtype)
    cos, sin = torch.randn(2, T, D).to(dtype)
    q_weight, k_weight = (torch.randn(D).to(dtype) if norms else None for _ in range(2))
    index = torch.randperm(3 * T)[:T]
    arguments = [qkv, cos, sin, q_weight, 1e-5, k_weight, 1e-6, index, q_heads, kv_heads]
    keys, values = torch.zeros(2, 3 * T, kv_heads * D).to(dtype)
    there = keys.cuda(), values.cuda()
    q = on_gpu(lambda *moved: rope_to_cache(*moved, *there), *arguments)[0]
    assert torch.equal(q, torch.ops.moesd.rope_to_cache(*arguments, keys, values))
    assert torch.equal(there[0].cpu(), keys) and torch.equal(there[1].cpu(), values)


@FIRST
@DTYPES
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations(activation, dtype):
    from moesd_kernels.dense.triton.activation_kernel import act_and_mul

    gate, up = (torch.randn(5, 2 * 2562) * 3).to(dtype).chunk(2, -1)
    actual = on_gpu(act_and_mul, gate, up, activation)[0]
    act = FUNCTIONS[activation]
    exact = act(gate.double()) * up.double()
    assert_as_accurate(actual, act(gate) * up, exact, name=activation)
    if activation.startswith("relu"):
        assert torch.equal(actual, ops.act_and_mul(gate, up, activation))


@FIRST
@DTYPES
@pytest.mark.parametrize("E, K", [(64, 8), (128, 8), (61, 4), (8, 2), (1024, 32)])
def test_router_chooses_as_the_operator(E, K, dtype):
    from moesd_kernels.dense.triton.router_kernel import topk_of_logits

    logits = (torch.randn(7, E) * 2).to(dtype)
    logits[1, E // 2], logits[2] = float("nan"), float("-inf")
    _, weights, ids = ops.softmax_topk_router(logits[3:], torch.eye(E).to(dtype), K, True)
    actual = on_gpu(topk_of_logits, logits, K, True)
    assert torch.equal(actual[1][3:], ids)
    torch.testing.assert_close(actual[0][3:], weights, rtol=2e-6, atol=1e-7)
    assert actual[0][1:3].isnan().all() and actual[1][1:3].tolist() == [[*range(K)]] * 2


@FIRST
@DTYPES
@pytest.mark.parametrize("V", [151936, 5000, 1])
def test_argmax_is_the_operators(V, dtype):
    from moesd_kernels.dense.triton.argmax_kernel import argmax

    values = torch.randn(6, V).mul(2).round().to(dtype)
    values[1, V // 2], values[2] = float("nan"), float("-inf")
    values[3], values[3, V // 2 :] = -0.0, 0.0
    for actual, expected in zip(on_gpu(argmax, values), ops.argmax(values), strict=True):
        assert torch.equal(actual, expected)


@FIRST
def test_a_chain_in_a_graph():
    """Launches that start early wait for what they read; a replay reads the inputs as they are."""
    from moesd_kernels.dense.triton.activation_kernel import act_and_mul
    from moesd_kernels.dense.triton.argmax_kernel import argmax
    from moesd_kernels.dense.triton.norm_kernel import add_rms_norm, rms_norm

    x, w = (
        torch.randn(4, 4096, device="cuda").bfloat16(),
        torch.ones(4096, device="cuda").bfloat16(),
    )

    def step():
        total, normed = x, rms_norm(x, w, 1e-6)
        for _ in range(20):
            total, normed = add_rms_norm(total, act_and_mul(normed, normed, "silu"), w, 1e-6)
        return normed, *argmax(normed)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(4, 4096))
        graph.replay()
        torch.cuda.synchronize()
        results = [result.clone() for result in captured]
        for actual, expected in zip(results, step(), strict=True):
            assert torch.equal(actual, expected)

"""Products on a GPU: precision, one order of sums for every T, split and neighbours, graphs.

Written without a GPU at hand. What is ours runs interpreted in ``interpreted/``; only here are the
instructions: that their width does not change the order in which they add.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.oracle import assert_as_accurate

from moesd_kernels.experts.triton import unavailable_reason

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"triton: {unavailable_reason()}"),
]

# N, K: what one program takes as a whole, what is split, and sizes without vector loads.
SHAPES = {"whole": (1152, 896), "split": (896, 4864), "odd": (333, 1201)}
TOKENS = (1, 2, 5, 16, 17, 32, 33, 64, 65, 128, 160, 300)
# Every kernel takes about a second to compile: the rarer dtypes have one shape each.
CASES = [
    *((name, torch.bfloat16) for name in SHAPES),
    ("split", torch.float16),
    ("split", torch.float32),
]


def kernel():
    """The kernel's file, which needs Triton."""
    from moesd_kernels.dense.triton import linear_kernel

    return linear_kernel


def case(name, dtype, T=300):
    N, K = SHAPES[name]
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(T, K, generator=generator, device="cuda").to(dtype)
    w = (torch.randn(N, K, generator=generator, device="cuda") / K**0.5).to(dtype)
    return x, w, torch.randn(N, generator=generator, device="cuda").to(dtype)


@pytest.fixture(autouse=True)
def exact_matmul():
    """The eager yardstick must not round fp32 to tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.first
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_matches_oracle(name, dtype):
    x, w, bias = case(name, dtype)
    for T in (1, 64, 300):
        exact = x[:T].double() @ w.double().T + bias.double()
        assert_as_accurate(kernel().linear(x[:T], w, bias), F.linear(x[:T], w, bias), exact)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_a_row_is_the_same_in_any_batch(name, dtype):
    x, w, bias = case(name, dtype)
    whole = kernel().linear(x, w, bias)
    for T in TOKENS:
        assert torch.equal(kernel().linear(x[:T], w, bias), whole[:T]), T
        assert torch.equal(kernel().linear(x[-T:], w, bias), whole[-T:]), T
    order = torch.randperm(len(x), device="cuda")
    assert torch.equal(kernel().linear(x[order], w, bias), whole[order])


@pytest.mark.parametrize("name", SHAPES)
def test_a_column_is_the_same_in_any_matrix(name):
    x, w, _ = case(name, torch.bfloat16, 5)
    parts = [kernel().linear(x, part) for part in w.tensor_split([100, 301])]
    assert torch.equal(kernel().linear(x, w), torch.cat(parts, 1))


@pytest.mark.parametrize("T", [1, 64, 300])
def test_splitting_changes_no_bit(T, monkeypatch):
    from moesd_kernels.dense.triton.linear_config import linear_tiles

    x, w, _ = case("split", torch.bfloat16, T)
    got = []
    for parts in (1, 8):
        tiles = lambda *a, parts=parts: replace(linear_tiles(*a), split_k=parts)
        monkeypatch.setattr(kernel(), "linear_tiles", tiles)
        got.append(kernel().linear(x, w))
    assert torch.equal(*got)


@pytest.mark.parametrize("T", [1, 5, 64, 300])
def test_gate_up_rounds_as_three_operations(T):
    x, w, _ = case("split", torch.bfloat16, T)
    gate, up = (kernel().linear(x, half) for half in w.chunk(2))
    assert torch.equal(kernel().gate_up(x, w, "relu2"), F.relu(gate).square() * up)
    linear = lambda kind: F.linear(x.to(kind), w.to(kind)).chunk(2, dim=-1)
    mlp = lambda kind: F.silu(linear(kind)[0]) * linear(kind)[1]
    assert_as_accurate(kernel().gate_up(x, w, "silu"), mlp(torch.bfloat16), mlp(torch.float64))


@pytest.mark.first
def test_a_graph_replays():
    """Counters return to zero: a chain of split products, replayed with other rows each time."""
    x, down, _ = case("split", torch.bfloat16, 5)
    back = case("split", torch.bfloat16, 1)[1].T.contiguous()

    def chain():
        for _ in range(3):
            y = kernel().linear(kernel().linear(x, down), back)
        return y

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for seed in range(20):
        generator = torch.Generator("cuda").manual_seed(seed)
        x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
        graph.replay()
        assert torch.equal(out, chain()), seed
    assert not kernel()._counters(x.device).any()

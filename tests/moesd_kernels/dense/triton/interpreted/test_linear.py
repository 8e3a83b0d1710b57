"""Products: as accurate as eager PyTorch, and one order of sums whatever T, split or neighbours.

The interpreter multiplies tiles with BLAS, whose rounding depends on a row's place in the tile; a
matrix instruction's does not. So where bits are compared, tiles are multiplied here column by
column, which tests what is ours: tiles, parts and the sums between them. test_linear_gpu.py tests
the instructions.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.interpreted import matrix_instruction as matrix_instruction
from support.oracle import ACTIVATIONS, assert_as_accurate

from moesd_kernels.dense.triton import linear_kernel
from moesd_kernels.dense.triton.linear_config import linear_tiles, part_count
from moesd_kernels.dense.triton.linear_kernel import gate_up, linear

DTYPES = [torch.float32, torch.float16]


def random(*sizes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes, generator=generator).to(dtype)


def weights(N, K, dtype, seed=1):
    return (random(N, K, dtype=torch.float32, seed=seed) / max(1, K) ** 0.5).to(dtype)


@pytest.fixture(params=[False, True], ids=["one program", "split"])
def split(request, monkeypatch):
    """Products that are split, or not, wherever they have parts."""

    def tiles(product, device):
        parts = part_count(product.K)
        return replace(linear_tiles(product, device), split_k=parts if request.param else 1)

    monkeypatch.setattr(linear_kernel, "linear_tiles", tiles)
    return request.param


SHAPES = [
    # T, N, K, why
    (1, 64, 128, "one row, one tile, one step"),
    (5, 40, 1100, "parts, and every mask"),
    (17, 33, 7, "less than a step"),
    (33, 30, 640, "two parts: the last is shorter"),
    (5, 1, 513, "one column; the last part has one"),
    (65, 65, 136, "more rows, and columns, than a tile holds"),
    (3, 5, 0, "nothing to sum"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "N", "K", "why"), SHAPES, ids=[s[-1] for s in SHAPES])
def test_matches_oracle(T, N, K, why, dtype, split):
    x, w, bias = random(T, K, dtype=dtype), weights(N, K, dtype), random(N, dtype=dtype, seed=2)
    for b in (None, bias):
        exact = x.double() @ w.double().T + (0 if b is None else b.double())
        assert_as_accurate(linear(x, w, b), F.linear(x, w, b), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_up_matches_oracle(activation, dtype, split):
    T, I, K = 5, 19, 700
    x, w = random(T, K, dtype=dtype), weights(2 * I, K, dtype)
    act = ACTIVATIONS[activation]

    def mlp(kind):
        gate, up = F.linear(x.to(kind), w.to(kind)).chunk(2, dim=-1)
        return act(gate) * up

    assert_as_accurate(gate_up(x, w, activation), mlp(dtype), mlp(torch.float64))


def test_gate_up_rounds_as_three_operations(matrix_instruction, split):
    x, w = random(20, 650, dtype=torch.float16), weights(140, 650, torch.float16)
    gate, up = (linear(x, half) for half in w.chunk(2))
    assert torch.equal(gate_up(x, w, "relu2"), F.relu(gate).square() * up)


# Rows: more than the highest tile holds; three parts, whose order shows in their sum.
CASES = pytest.mark.parametrize(
    ("rows", "dtype"), [(34, torch.float32), (150, torch.float16)], ids=["fp32", "fp16"]
)


@CASES
def test_a_row_is_the_same_in_any_batch(rows, dtype, matrix_instruction):
    x, w, bias = random(rows, 1100, dtype=dtype), weights(30, 1100, dtype), weights(1, 30, dtype)[0]
    whole = linear(x, w, bias)
    for T in (1, 5, 17, 33, 65, 130):
        assert torch.equal(linear(x[:T], w, bias), whole[:T]), T
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    assert torch.equal(linear(x[order], w, bias), whole[order])


@CASES
def test_a_column_is_the_same_in_any_matrix(rows, dtype, matrix_instruction):
    x, w = random(6, 1100, dtype=dtype), weights(70, 1100, dtype)
    parts = [linear(x, part) for part in w.split([40, 30])]
    assert torch.equal(linear(x, w), torch.cat(parts, 1))


@CASES
def test_splitting_changes_no_bit(rows, dtype, matrix_instruction, monkeypatch):
    x, w, got = random(rows, 1100, dtype=dtype), weights(30, 1100, dtype), []
    for parts in (1, 3):
        tiles = lambda *a, parts=parts: replace(linear_tiles(*a), split_k=parts)
        monkeypatch.setattr(linear_kernel, "linear_tiles", tiles)
        got.append(linear(x, w))
    assert torch.equal(*got)


def test_counters_are_zero_between_launches(split):
    x, w = random(3, 1100, dtype=torch.float16), weights(100, 1100, torch.float16)
    first = linear(x, w)
    assert torch.equal(linear(x, w), first)
    assert not linear_kernel._counters(x.device).any()


def test_strides():
    x, w = random(9, 300, dtype=torch.float16), weights(50, 300, torch.float16)
    expected = linear(x[:, 20:220].contiguous(), w[:, 64:264].contiguous())
    assert torch.equal(linear(x[:, 20:220], w[:, 64:264]), expected)
    assert torch.equal(linear(x.T.contiguous().T[:, 20:220], w[:, 64:264]), expected)


@pytest.mark.parametrize("T", [0, 2])
def test_no_rows_or_columns(T):
    x = random(T, 16, dtype=torch.float32)
    assert linear(x[:0], weights(8, 16, torch.float32)).shape == (0, 8)
    assert linear(x, weights(0, 16, torch.float32)).shape == (T, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w: linear(x.int(), w.int()), TypeError, "x must be float32, bfloat16"),
        (lambda x, w: linear(x[0], w), ValueError, r"x must be \[T, K\], got \[16\]"),
        (lambda x, w: linear(x, w[:, :8]), ValueError, r"w must be \[6, 16\], got \[6, 8\]"),
        (lambda x, w: linear(x, w.half()), TypeError, "w must be torch.float32"),
        (lambda x, w: linear(x, w.T.contiguous().T), ValueError, "rows of w must be contiguous"),
        (lambda x, w: linear(x, w, w[0]), ValueError, r"bias must be \[6\], got \[16\]"),
        (lambda x, w: gate_up(x, w[:5], "silu"), ValueError, r"must be \[2I, K\], got \[5, 16\]"),
        (lambda x, w: gate_up(x, w, "swish"), ValueError, "activation must be one of .* got 'swi"),
    ],
)
def test_refusals(call, error, message):
    x, w = random(2, 16, dtype=torch.float32), weights(6, 16, torch.float32)
    with pytest.raises(error, match=message):
        call(x, w)

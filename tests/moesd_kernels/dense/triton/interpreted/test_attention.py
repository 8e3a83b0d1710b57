"""Ragged attention interpreted: against fp64, and the same bits however rows and keys are shared.

The interpreter multiplies tiles with BLAS, whose rounding depends on a row's place in the tile; a
matrix instruction's does not. So tiles are multiplied column by column where bits are compared.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.oracle import assert_as_accurate, attention_in, attention_inputs

from moesd_kernels.dense.triton import attention
from moesd_kernels.dense.triton.attention import ragged_attention

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
SCALE = 0.1


@pytest.fixture(autouse=True)
def short_unrolling(monkeypatch):
    """Interpreted, loads behind a row's last block cost what others do."""
    monkeypatch.setattr(attention, "UNROLL", 2)


@pytest.fixture
def exact_rows(monkeypatch):
    """Products that round a row the same way wherever it lies in its tile."""

    def matmul(a, b, dtype):
        total = np.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            total += a[:, k : k + 1].astype(dtype) * b[k].astype(dtype)
        return total

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.fixture
def shared_by(monkeypatch):
    """Sets how many programs share a tile's blocks."""
    return lambda programs: monkeypatch.setattr(attention, "num_programs", lambda *_: programs)


def check(q, k, v, positions, **options):
    actual = ragged_attention(q, k, v, positions, SCALE, **options)
    baseline = attention_in(q, k, v, positions, SCALE, q.dtype, **options)
    exact = attention_in(q, k, v, positions, SCALE, torch.float64, **options)
    assert_as_accurate(actual, baseline, exact, name="attention")
    return actual


# A block is 32 keys in fp32, 128 (64 of wide heads) in fp16; a tile 16 rows, or 32.
SHAPES = {
    "one query, one block": (1, 1, 2, 2, 16, 16, 8),
    "grouped, several blocks": (2, 2, 4, 2, 64, 64, 150),
    "more rows than a tile": (1, 3, 11, 1, 32, 32, 40),
    "odd dimensions": (1, 2, 3, 1, 21, 37, 50),
    "other value dimension, wide heads": (1, 1, 2, 1, 256, 24, 140),
}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("options", [{}, {"window": 40, "sinks": True}], ids=str)
def test_matches_fp64(shape, options, dtype):
    if options:
        sinks = torch.randn(shape[2], generator=torch.Generator().manual_seed(3))
        options = options | {"sinks": sinks}
    check(*attention_inputs(*shape, dtype), **options)


@pytest.mark.parametrize("window", [0, 9])
def test_rows_pick_cache_rows_and_padding_is_zero(window):
    q, k, v, positions = attention_inputs(4, 2, 2, 1, 32, 32, 50, torch.float32)
    positions[1, 1] = positions[2] = -1
    actual = check(q, k, v, positions, rows=torch.tensor([3, 0, 3, 1]), window=window)
    assert bool((actual[1, 1] == 0).all()) and bool((actual[2] == 0).all())


def test_many_queries_walk_all_blocks(shared_by):
    """A prefill: more tiles than multiprocessors, so that each has a program of its own."""
    shared_by(1)
    q, k, v, _ = attention_inputs(1, 40, 2, 1, 16, 16, 200, torch.float16)
    check(q, k, v, torch.arange(100, 140)[None])


@pytest.mark.parametrize("window", [0, 33])
def test_a_verify_is_single_steps(exact_rows, shared_by, window):
    """Rows, keys and launches shared in any way, and each alone: the same bits."""
    q, k, v, _ = attention_inputs(2, 3, 6, 1, 16, 16, 110, torch.float32)
    positions = torch.tensor([[62], [97]]) + torch.arange(3)  # across two blocks; many blocks
    options = {"window": window, "sinks": torch.randn(6)}
    verify = ragged_attention(q, k, v, positions, SCALE, **options)
    order = torch.tensor([1, 0])
    mixed = ragged_attention(
        q[order], k, v, positions[order], SCALE, rows=order, length=10**6, **options
    )
    assert torch.equal(mixed, verify[order])
    for programs, length in ((2, 100), (1, None)):
        shared_by(programs)
        other = ragged_attention(q, k, v, positions, SCALE, length=length, **options)
        assert torch.equal(other, verify)
        for b, j in ((0, 0), (0, 2), (1, 1)):
            one = slice(b, b + 1), slice(j, j + 1)
            alone = ragged_attention(
                q[one], k, v, positions[one], SCALE, rows=torch.tensor([b]), **options
            )
            assert torch.equal(alone[0, 0], verify[b, j]), (b, j, programs)


def test_one_block_without_partial_sums_is_one_with_them(exact_rows, shared_by):
    q, k, v, positions = attention_inputs(2, 2, 2, 1, 32, 32, 30, torch.float32)
    direct = ragged_attention(q, k, v, positions, SCALE)
    shared_by(2)
    assert torch.equal(ragged_attention(q, k, v, positions, SCALE), direct)


@pytest.mark.parametrize(("window", "programs"), [(0, 1), (20, 3)])
def test_queries_of_a_tile_do_not_depend_on_each_other(exact_rows, shared_by, window, programs):
    """Positions apart, equal, descending, dead; non-finite values that only later queries see."""
    q, k, v, _ = attention_inputs(1, 6, 2, 1, 16, 16, 90, torch.float32)
    positions = torch.tensor([[31, 69, 80, 3, -1, 80]])  # 69 is in the block of those not finite
    if programs == 1:
        k[:, 70] = float("inf")
    v[:, 71, 0, 3] = float("nan") if programs == 1 else float("inf")
    shared_by(programs)
    every = ragged_attention(q, k, v, positions, SCALE, window=window)
    for j in range(6):
        one = slice(j, j + 1)
        alone = ragged_attention(q[:, one], k, v, positions[:, one], SCALE, window=window)
        assert torch.equal(alone.nan_to_num(7), every[:, one].nan_to_num(7)), j
        finite = every[0, j].isfinite()
        assert not bool(finite.any()) if j in (2, 5) else bool(finite.all()), j


def test_positions_behind_and_before_are_not_read():
    q, k, v, positions = attention_inputs(2, 2, 2, 1, 32, 32, 60, torch.float32)
    clean = ragged_attention(q, k, v, positions, SCALE, window=4)
    for b in range(2):
        for cache in (k, v):
            cache[b, int(positions[b, -1]) + 1 :] = float("nan")
            cache[b, : max(0, int(positions[b, 0]) - 3)] = float("nan")
    assert torch.equal(ragged_attention(q, k, v, positions, SCALE, window=4), clean)


def test_queries_beyond_the_length_stand_at_its_end(shared_by):
    q, k, v, _ = attention_inputs(1, 3, 2, 1, 16, 16, 70, torch.float32)
    positions = torch.tensor([[20, 70, 2**40]])
    for programs in (3, 1):
        shared_by(programs)
        for end in (None, 40):
            got = ragged_attention(q, k, v, positions, SCALE, length=end)
            inside = positions.clamp(max=(end or 70) - 1)
            assert torch.equal(got, ragged_attention(q, k, v, inside, SCALE))


def test_scores_without_a_softmax_are_nan_and_sinks_take_their_place():
    q, k, v, _ = attention_inputs(1, 1, 2, 1, 16, 16, 40, torch.float32)
    q, k[:, :33] = q.abs(), -float("inf")
    positions = torch.tensor([[32]])
    assert bool(ragged_attention(q, k, v, positions, SCALE).isnan().all())
    assert bool((ragged_attention(q, k, v, positions, SCALE, sinks=torch.zeros(2)) == 0).all())
    seen = ragged_attention(q, k, v, torch.tensor([[33]]), SCALE)  # one key is finite
    assert torch.equal(seen[0, 0], v[0, 33].expand(2, 16))


def test_no_queries():
    q, k, v, positions = attention_inputs(2, 1, 4, 2, 16, 16, 10, torch.float32)
    assert ragged_attention(q[:0], k, v, positions[:0], 1.0).shape == (0, 1, 4, 16)
    assert bool((ragged_attention(q, k[:, :0], v[:, :0], positions * 0 - 1, 1.0) == 0).all())


def test_errors():
    q, k, v, positions = attention_inputs(2, 2, 4, 2, 16, 16, 10, torch.float32)
    call = ragged_attention
    with pytest.raises(ValueError, match=r"q must be \[B, Q, Hq, D\], got \[2, 4, 16\]"):
        call(q[:, 0], k, v, positions, 1.0)
    with pytest.raises(ValueError, match=r"positions must be \[2, 2\], got \[2, 1\]"):
        call(q, k, v, positions[:, :1], 1.0)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        call(q, k.transpose(1, 3), v, positions, 1.0)
    with pytest.raises(TypeError, match=r"v_cache must be torch.float32, got torch.bfloat16"):
        call(q, k, v.bfloat16(), positions, 1.0)
    with pytest.raises(ValueError, match="multiple of the key heads 2, got 3"):
        call(q[:, :, :3], k, v, positions, 1.0)
    with pytest.raises(ValueError, match="head dimension up to 256, got 512"):
        call(q.repeat(1, 1, 1, 32), k.repeat(1, 1, 1, 32), v, positions, 1.0)
    with pytest.raises(ValueError, match=r"sinks must be \[4\], got \[3\]"):
        call(q, k, v, positions, 1.0, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match=r"k_cache must have at least 2 rows, got 1"):
        call(q, k[:1], v[:1], positions, 1.0)
    with pytest.raises(ValueError, match=r"rows must be \[2\], got \[1\]"):
        call(q, k, v, positions, 1.0, rows=torch.tensor([0]))

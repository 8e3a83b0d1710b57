"""moesd::ragged_attention on the CPU: against fp64 row by row, invariance, unread positions."""

from __future__ import annotations

import pytest
import torch
from support.oracle import assert_as_accurate, attention_in, attention_inputs

from moesd_kernels.dense import ops

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)


# Multi-head, grouped, many heads per key, odd dimensions, different value dimension, long rows.
SHAPES = {
    "one query": (1, 1, 2, 2, 16, 16, 8),
    "grouped": (3, 4, 8, 2, 64, 64, 40),
    "sixteen heads on one key": (2, 3, 16, 1, 32, 32, 20),
    "odd dimensions": (2, 2, 6, 2, 21, 37, 30),
    "several blocks of positions": (2, 2, 4, 2, 64, 128, 300),
}


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"sinks": True}], ids=str)
def test_matches_fp64(shape, options, dtype):
    q, k, v, positions = attention_inputs(*shape, dtype)
    if options.get("sinks"):
        options = {"sinks": torch.randn(shape[2], generator=torch.Generator().manual_seed(3))}
    scale = shape[4] ** -0.5
    actual = ops.ragged_attention(q, k, v, positions, scale, **options)
    baseline = attention_in(q, k, v, positions, scale, dtype, **options)
    exact = attention_in(q, k, v, positions, scale, torch.float64, **options)
    assert_as_accurate(actual, baseline, exact, name="attention")


def test_rows_pick_cache_rows_and_dead_queries_are_zero():
    q, k, v, positions = attention_inputs(4, 2, 4, 2, 32, 32, 20, torch.bfloat16)
    rows = torch.tensor([3, 0, 3, 1])
    positions[1, 1] = -1
    actual = ops.ragged_attention(q, k, v, positions, 0.2, rows=rows)
    exact = attention_in(q, k, v, positions, 0.2, torch.float64, rows=rows)
    baseline = attention_in(q, k, v, positions, 0.2, torch.bfloat16, rows=rows)
    assert_as_accurate(actual, baseline, exact, name="rows")
    assert bool((actual[1, 1] == 0).all())


def test_slots_after_the_position_are_not_read():
    q, k, v, positions = attention_inputs(3, 2, 4, 2, 32, 32, 20, torch.bfloat16)
    clean = ops.ragged_attention(q, k, v, positions, 0.2, window=4)
    for b in range(3):
        for cache in (k, v):
            cache[b, int(positions[b, -1]) + 1 :] = float("nan")
            cache[b, : max(0, int(positions[b, 0]) - 3)] = float("nan")
    assert torch.equal(ops.ragged_attention(q, k, v, positions, 0.2, window=4), clean)


@DTYPES
@pytest.mark.parametrize("length", [1, 2, 7, 16, 17, 129, 130])
def test_the_slot_after_an_odd_or_even_number_is_not_read(length, dtype):
    q, k, v, _ = attention_inputs(1, 1, 4, 2, 32, 40, 132, dtype)
    positions = torch.tensor([[length - 1]])
    clean = ops.ragged_attention(q, k, v, positions, 0.2)
    k[:, length:], v[:, length:] = float("nan"), float("inf")
    assert torch.equal(ops.ragged_attention(q, k, v, positions, 0.2), clean)


@DTYPES
def test_a_query_does_not_depend_on_the_batch(dtype, threads):
    q, k, v, positions = attention_inputs(5, 4, 6, 2, 48, 48, 200, dtype)
    whole = ops.ragged_attention(q, k, v, positions, 0.1)
    for count in (1, 2):
        threads(count)
        for b in range(5):
            for j in range(4):
                alone = ops.ragged_attention(
                    *(q[b : b + 1, j : j + 1], k, v, positions[b : b + 1, j : j + 1], 0.1),
                    rows=torch.tensor([b]),
                )
                assert torch.equal(alone[0, 0], whole[b, j]), (b, j, count)
        order = torch.tensor([4, 2, 0, 1, 3])
        mixed = ops.ragged_attention(q[order], k, v, positions[order], 0.1, rows=order)
        assert torch.equal(mixed, whole[order])


@pytest.mark.parametrize("window", [0, 150])
def test_queries_that_share_a_pass_do_not_depend_on_each_other(window):
    """Positions apart, equal, descending, dead; non-finite values that only later queries see."""
    q, k, v, _ = attention_inputs(1, 6, 8, 2, 64, 64, 300, torch.bfloat16)
    positions = torch.tensor([[127, 128, 280, 3, -1, 280]])
    k[:, 200], v[:, 200] = float("inf"), float("nan")
    whole = ops.ragged_attention(q, k, v, positions, 0.1, window=window)
    for j in range(6):
        one = slice(j, j + 1)
        alone = ops.ragged_attention(q[:, one], k, v, positions[:, one], 0.1, window=window)
        assert torch.equal(alone.nan_to_num(7), whole[:, one].nan_to_num(7)), j
        assert bool(whole[0, j].isfinite().all()) == (j not in (2, 5)), j


def test_schema_and_fake():
    q, k, v, positions = attention_inputs(2, 2, 4, 2, 16, 24, 10, torch.bfloat16)
    torch.library.opcheck(
        torch.ops.moesd.ragged_attention.default, (q, k, v, positions, 0.2, 0, None, None)
    )


def test_errors():
    q, k, v, positions = attention_inputs(2, 2, 4, 2, 16, 16, 10, torch.float32)
    call = ops.ragged_attention
    with pytest.raises(ValueError, match=r"q must be \[B, Q, Hq, D\], got \[2, 4, 16\]"):
        call(q[:, 0], k, v, positions, 1.0)
    with pytest.raises(IndexError, match="positions must be below 10, got 10"):
        call(q, k, v, torch.full((2, 2), 10), 1.0)
    with pytest.raises(IndexError, match="rows must be below 2, got 2"):
        call(q, k, v, positions, 1.0, rows=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"positions must be \[2, 2\], got \[2, 1\]"):
        call(q, k, v, positions[:, :1], 1.0)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        call(q, k.transpose(1, 3), v, positions, 1.0)
    with pytest.raises(TypeError, match="v_cache must be Float like q, got BFloat16"):
        call(q, k, v.bfloat16(), positions, 1.0)
    with pytest.raises(ValueError, match="multiple of the key heads 2, got 3"):
        call(q[:, :, :3], k, v, positions, 1.0)


def test_padding_reads_nothing_before_the_cache():
    """A query at position -1 sees nothing: here the page before the keys must not be touched."""
    import ctypes
    import mmap

    page, shape = mmap.PAGESIZE, (1, 32, 2, 64)
    region = mmap.mmap(-1, 5 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    k, v = (
        torch.frombuffer(region, dtype=torch.float32, count=32 * 128, offset=page).view(shape)
        for _ in range(2)
    )
    assert k.data_ptr() == start + page and k.nbytes == 4 * page
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 0) == 0  # PROT_NONE
    q, positions = torch.randn(1, 2, 4, 64), torch.tensor([[0, -1]])
    out = ops.ragged_attention(q, k, v, positions, 0.125)
    assert out[0, 1].eq(0).all()
    assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 3) == 0

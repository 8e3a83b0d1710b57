"""Queries, keys and values have the bits of the C++ operator wherever the norms' sums do."""

import pytest
import torch

from moesd_kernels.dense.triton.rope_kernel import rope_to_cache

# Halves that are no power of two; heads that fill no group; one group each; a head wider than one.
SHAPES = [(1, 1, 1, 6), (3, 4, 2, 40), (2, 14, 2, 64), (2, 5, 5, 128), (1, 2, 1, 576)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


def case(T, q_heads, kv_heads, D, dtype, norms=(True, True)):
    """Arguments up to the cache; whole numbers, whose squares have the same sum in every order."""
    qkv = torch.randint(-3, 4, (T, (q_heads + 2 * kv_heads) * D)).to(dtype)
    cos, sin = torch.randn(2, T, D).to(dtype)
    q_weight, k_weight = (torch.randn(D).to(dtype) if norm else None for norm in norms)
    index = torch.randperm(3 * T + 1)[:T]
    return [qkv, cos, sin, q_weight, 1e-5, k_weight, 1e-6, index, q_heads, kv_heads]


def cache(T, kv_heads, D, dtype):
    return [torch.full((3 * T + 1, kv_heads * D), float(fill)).to(dtype) for fill in (7, 8)]


@DTYPES
@pytest.mark.parametrize("T, q_heads, kv_heads, D", SHAPES)
@pytest.mark.parametrize("norms", [(False, False), (True, True), (True, False)], ids=str)
def test_rounds_as_the_operator(T, q_heads, kv_heads, D, norms, dtype):
    arguments = case(T, q_heads, kv_heads, D, dtype, norms)
    if norms == (False, False):
        arguments[0] = torch.randn_like(arguments[0])
    actual, expected = cache(T, kv_heads, D, dtype), cache(T, kv_heads, D, dtype)
    q = rope_to_cache(*arguments, *actual)
    assert torch.equal(q, torch.ops.moesd.rope_to_cache(*arguments, *expected))
    # The whole cache: nothing beside the tokens' rows was written.
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


def test_a_token_depends_on_itself_alone():
    qkv, cos, sin, *rest = case(4, 3, 2, 8, torch.float32)
    qkv, index = torch.randn_like(qkv), rest[4]
    keys, values = cache(4, 2, 8, torch.float32)
    q = rope_to_cache(qkv, cos, sin, *rest, keys, values)
    for t in range(4):
        own_keys, own_values = cache(4, 2, 8, torch.float32)
        rest[4] = index[t : t + 1]
        row = slice(t, t + 1)
        alone = rope_to_cache(qkv[row], cos[row], sin[row], *rest, own_keys, own_values)
        assert torch.equal(alone[0], q[t])
        assert torch.equal(own_keys[index[t]], keys[index[t]])
        assert torch.equal(own_values[index[t]], values[index[t]])


def test_rows_may_be_strided():
    T, q_heads, kv_heads, D = 3, 3, 2, 8
    arguments = case(T, q_heads, kv_heads, D, torch.float32)
    wide = [torch.cat([x, x.flip(1)], 1)[:, : x.shape[1]] for x in arguments[:3]]
    slabs = torch.zeros(3 * T + 1, 2, kv_heads * D)
    keys, values = cache(T, kv_heads, D, torch.float32)
    keys.zero_(), values.zero_()
    q = rope_to_cache(*wide, *arguments[3:], *slabs.unbind(1))
    assert torch.equal(q, rope_to_cache(*arguments, keys, values))
    assert torch.equal(slabs, torch.stack([keys, values], 1))


def test_an_index_outside_writes_nothing():
    arguments = case(3, 2, 1, 8, torch.float32)
    keys, values = cache(3, 1, 8, torch.float32)
    guarded = [torch.cat([x, x, x]) for x in (keys, values)]
    middle = [x[10:20] for x in guarded]
    arguments[7] = torch.tensor([-1, 10, 2])
    rope_to_cache(*arguments, *middle)
    for x, fill in zip(guarded, (7, 8), strict=True):
        written = (x != fill).any(1).nonzero().flatten()
        assert written.tolist() == [12]


def test_empty_and_errors():
    good = case(2, 2, 1, 6, torch.float32)
    keys, values = torch.zeros(4, 6), torch.zeros(4, 6)
    empty = [x[:0] if i in (0, 1, 2, 7) else x for i, x in enumerate(good)]
    assert rope_to_cache(*empty, keys, values).shape == (0, 2, 6)
    for place, changed, error, message in (
        (0, torch.zeros(24, 2).T, ValueError, "qkv must have adjacent columns"),
        (2, torch.zeros(2, 4), ValueError, r"sin must be \[2, 6\], got \[2, 4\]"),
        (1, torch.zeros(2, 5), ValueError, "must be even"),
        (2, torch.zeros(2, 6).half(), TypeError, "sin must be torch.float32, got torch.float16"),
        (5, torch.ones(5), ValueError, r"k_weight must be \[6\], got \[5\]"),
        (7, torch.zeros(2).int(), TypeError, "index must be torch.int64, got torch.int32"),
        (8, 0, ValueError, "heads must be positive, got 0 and 1"),
        (11, torch.zeros(3, 6), ValueError, r"values must be \[4, 6\], got \[3, 6\]"),
    ):
        arguments = [*good, keys, values]
        arguments[place] = changed
        with pytest.raises(error, match=message):
            rope_to_cache(*arguments)

"""NaN and infinity show in the rows they are in and in no other; ids stay ids.

The ops of this folder and the experts, which share their kernels.
"""

from __future__ import annotations

import pytest
import torch

from moesd_kernels import fused_experts
from moesd_kernels.dense import ops
from moesd_kernels.hooks.routers import RouterRule

pytestmark = pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable()))
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
NAN, INF = float("nan"), float("inf")


def randn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_only_row(call, x, row, value=NAN):
    """``call(x)`` is undefined in ``row``, once ``x`` is, and unchanged in all others."""
    clean = call(x)
    bad = x.clone()
    bad[row, 1] = value
    actual = call(bad)
    assert not actual[row].isfinite().all()
    others = torch.arange(len(x)) != row
    assert clean.isfinite().all() and torch.equal(actual[others], clean[others])


# Fewer experts than any vector has lanes, a rest, whole vectors; up to all of them chosen.
@DTYPES
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize(("E", "K"), [(1, 1), (2, 2), (5, 2), (8, 8), (16, 3), (33, 4), (128, 8)])
def test_softmax_router(E, K, value, renormalize, dtype):
    x, w = randn(5, 8, dtype=dtype), randn(E, 8, dtype=dtype, seed=1)
    clean = ops.softmax_topk_router(x, w, K, renormalize)
    x[1, 3], x[3] = value, value  # of the logits of row 1 some may be inf and some -inf
    logits, weights, ids = ops.softmax_topk_router(x, w, K, renormalize)
    assert ((ids >= 0) & (ids < E)).all()
    assert all(len(set(row)) == K for row in ids.tolist())
    undefined = logits.float().softmax(-1).isnan().any(-1)
    assert undefined[3] and torch.equal(weights.isnan().all(-1), undefined)
    assert torch.equal(weights.isnan().any(-1), undefined)
    for t in (0, 2, 4):
        assert torch.equal(weights[t], clean[1][t]) and torch.equal(ids[t], clean[2][t])


@pytest.mark.parametrize("kind", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("place", [0, 5, 7])
def test_composed_routers(kind, groups, place):
    rule = RouterRule(kind, 2, renormalize=True, num_groups=groups, topk_groups=1)
    logits = randn(3, 8, dtype=torch.float32)
    clean = rule.select(logits.clone())
    logits[1, place] = NAN
    _, weights, ids = rule.select(logits)
    assert ((ids >= 0) & (ids < 8)).all() and weights[1].isnan().any()
    assert torch.equal(weights[::2], clean.weights[::2]) and torch.equal(ids[::2], clean.ids[::2])


@DTYPES
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("width", [3, 40, 150])
def test_rows_of_the_dense_ops(width, value, dtype):
    x, ones = randn(5, width, dtype=dtype), torch.ones(width, dtype=dtype)
    weight = randn(9, width, dtype=dtype, seed=1)
    bad = lambda call: assert_only_row(call, x, 2, value)
    bad(lambda x: ops.linear(x, weight))
    for cast_first in (True, False):
        bad(lambda x, cast=cast_first: ops.rms_norm(x, ones, 1e-6, cast_first=cast))
    bad(lambda x: ops.add_rms_norm(x, torch.zeros_like(x), ones, 1e-6)[0])
    bad(lambda x: ops.add_rms_norm(torch.zeros_like(x), x, ones, 1e-6)[1])
    for name in torch.ops.moesd.activation_names():
        bad(lambda x, name=name: ops.act_and_mul(x, ones.expand_as(x), name))
        bad(lambda x, name=name: ops.act_and_mul(ones.expand_as(x), x, name))


@DTYPES
def test_a_weight_is_in_one_column(dtype):
    x, weight = randn(20, 150, dtype=dtype), randn(70, 150, dtype=dtype, seed=1)
    assert_only_row(lambda w: ops.linear(x, w).T, weight, 33)


def attended(q, k, v, positions):
    """Attention, with which queries are undefined, ``[B, Q]``."""
    out = ops.ragged_attention(q, k, v, torch.tensor(positions), 0.3)
    return out, ~out.isfinite().flatten(2).all(-1)


@DTYPES
@pytest.mark.parametrize(("tensor", "value"), [("k", NAN), ("v", NAN), ("v", INF), ("v", -INF)])
@pytest.mark.parametrize("place", [0, 1, 15, 16, 127, 128, 140])
def test_attention_shows_what_it_sees_and_hides_the_rest(place, tensor, value, dtype):
    q, k, v = (randn(2, n, h, 24, dtype=dtype, seed=n) for n, h in ((3, 4), (150, 2), (150, 2)))
    positions = [[place - 1, place, 149], [145, 146, 147]]
    clean, undefined = attended(q, k, v, positions)
    assert not undefined.any()
    {"k": k, "v": v}[tensor][0, place] = value
    actual, undefined = attended(q, k, v, positions)
    assert undefined.tolist() == [[False, True, True], [False] * 3]
    assert torch.equal(actual[~undefined], clean[~undefined])


@DTYPES
@pytest.mark.parametrize("length", [1, 20, 140])
def test_attention_without_a_softmax_is_undefined(length, dtype):
    """Every score -inf: torch's softmax is NaN, and a mean of the values would hide it."""
    q, k, v = (randn(1, n, 2, 16, dtype=dtype, seed=n) for n in (1, length, length + 1))
    q[0, 0, 0], k = -INF, k.abs() + 1
    out = ops.ragged_attention(q, k, v[:, :length], torch.tensor([[length - 1]]), 0.3)
    assert out[0, 0, 0].isnan().all() and out[0, 0, 1].isfinite().all()


@DTYPES
def test_rope_rows(dtype):
    qkv, table = randn(5, 4 * 32, dtype=dtype), torch.ones(5, 32, dtype=dtype)
    norm = (torch.ones(32, dtype=dtype), 1e-6)
    keys = torch.zeros(5, 32, dtype=dtype)

    def queries(qkv):
        return ops.rope_to_cache(
            *(qkv, table, table, norm, norm, torch.arange(5), keys, keys.clone())
        ).flatten(1)

    assert_only_row(queries, qkv, 2)


@DTYPES
@pytest.mark.parametrize("H", [8, 70])
def test_experts(H, dtype):
    T, E, K, I = 9, 5, 3, 20
    x = randn(T, H, dtype=dtype)
    w = randn(E, 2 * I, H, dtype=dtype, seed=1), randn(E, H, I, dtype=dtype, seed=2)
    weights = torch.rand(T, K, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(T * K).view(T, K) % (E - 1)  # the last expert is nobody's
    call = lambda x, weights=weights, ids=ids: fused_experts(x, *w, ids, weights, backend="cpu")
    assert_only_row(call, x, 4)
    assert_only_row(call, x, 4, INF)
    assert_only_row(lambda weights: call(x, weights), weights, 4)
    clean = call(x)
    w[0][E - 1], w[1][E - 1] = NAN, NAN
    assert torch.equal(call(x), clean)
    # An id that is no expert contributes nothing, whatever its weight.
    routed = ids.clone()
    routed[2, 0], routed[3, 1], routed[4, 2], routed[5] = -1, E, 2**40, -(2**62)
    others = weights.masked_fill((routed < 0) | (routed >= E), 0.0)
    expected = call(x, others, routed.clamp(0, E - 2))
    nan = weights.masked_fill((routed < 0) | (routed >= E), NAN)
    assert torch.equal(call(x, nan, routed), expected)
    assert (expected[5] == 0).all()

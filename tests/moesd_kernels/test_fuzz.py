"""Random calls of every native op: odd sizes, views at odd places, extreme values.

Whatever the values, a result has the right shape, each of its rows is the one that the row has when
computed alone, bit for bit, and no argument has changed. Ordinary values are also held to fp64.
Tensors end where their storage ends, so that a sanitizer sees a step beyond
(``make test-sanitized``: more calls, on each instruction set).
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support.fuzz import COUNTS, WIDTHS, Draw, same
from support.fuzz.experts import EXPERTS
from support.fuzz.linear import LINEAR
from support.fuzz.recurrent import RECURRENT
from torch import Tensor

from moesd_kernels.dense import ops
from moesd_kernels.experts.spec.activations import FUNCTIONS
from moesd_kernels.formats import dequantize

CALLS = int(os.environ.get("MOESD_FUZZ_CALLS", "60"))  # of each op


def norms(d: Draw) -> None:
    T, H = d.among(COUNTS), d.among(WIDTHS)
    (x, delta), w = (d.any_layout(T, H) for _ in range(2)), d.any_layout(H)
    rule = {"offset": d.among((0.0, 1.0)), "cast_first": d.chance()}
    out = ops.rms_norm(x, w, 1e-6, **rule)
    exact = lambda x, w: x * (x.pow(2).mean(-1, True) + 1e-6).rsqrt() * (w + rule["offset"])
    d.close(out, exact, x, w)
    total, normed = ops.add_rms_norm(x, delta, w, 1e-6)
    same(total, x + delta)
    same(normed, ops.rms_norm(x + delta, w, 1e-6))
    if T:
        t = d.among(range(T))
        same(ops.rms_norm(x[t], w, 1e-6, **rule), out[t])


def activations(d: Draw) -> None:
    T, I = d.among(COUNTS), d.among((*WIDTHS, 5000))
    gate, up = d.any_layout(T, I), d.any_layout(T, I)
    name = d.among(torch.ops.moesd.activation_names())
    out = ops.act_and_mul(gate, up, name)
    d.close(out, lambda gate, up: FUNCTIONS[name](gate) * up, gate, up)
    if T:
        t = d.among(range(T))
        same(ops.act_and_mul(gate[t], up[t], name), out[t])


def router(d: Draw) -> None:
    T, H, E = d.among(COUNTS), d.among(WIDTHS), d.among((1, 2, 3, 5, 8, 16, 17, 33, 128, 1024))
    K, renormalize = d.among((1, 1 + E // 4, E)), d.chance()
    x, w = d.any_layout(T, H), d.flat(E, H, scale=max(H, 1) ** -0.5)
    logits, weights, ids = ops.softmax_topk_router(x, w, K, renormalize)
    same(logits, ops.linear(x, w))
    assert ids.shape == weights.shape == (T, K) and ((ids >= 0) & (ids < E)).all()
    assert all(len(set(row)) == K for row in ids.tolist())
    probs = logits.float().softmax(-1).gather(1, ids)
    if renormalize:
        probs /= probs.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, probs, rtol=1e-4, atol=1e-6, equal_nan=True)


def argmax(d: Draw) -> None:
    T, V = d.among(COUNTS), d.among((*WIDTHS[1:], 5000))
    x = d.any_layout(T, V)
    ids, undefined = ops.argmax(x)
    assert torch.equal(ids, x.argmax(-1))
    top = x.float().amax(-1)
    assert torch.equal(undefined, top.isnan() | (top == -float("inf")))


def race(d: Draw) -> None:
    T, V = d.among(COUNTS), d.among((*WIDTHS[1:], 5000))
    probs = d.flat(T, V).float().softmax(-1)
    tokens = ops.race(probs, torch.randint(-(2**63), 2**63 - 1, (T,)))
    assert ((tokens >= 0) & (tokens < V)).all()


def rotary(d: Draw) -> None:
    T, D = d.among(COUNTS), d.among((2, 6, 8, 16, 22, 32, 64, 96, 128, 576))
    q_heads, kv_heads, rows = d.among((1, 3, 5, 8)), d.among((1, 2, 5)), T + 3
    qkv = d.flat(T, (q_heads + 2 * kv_heads) * D)
    tables = d.flat(T, D), d.flat(T, D)
    norms = [(d.flat(D), 1e-6) if d.chance() else None for _ in range(2)]
    index = torch.randperm(rows)[:T]
    keys, values = (torch.full((rows, kv_heads * D), 7.0, dtype=d.dtype) for _ in range(2))
    q = ops.rope_to_cache(qkv, *tables, *norms, index, keys, values)
    assert q.shape == (T, q_heads, D)
    same(values[index], qkv[:, (q_heads + kv_heads) * D :])
    untouched = torch.ones(rows, dtype=torch.bool).index_fill(0, index, False)
    assert (keys[untouched] == 7).all() and (values[untouched] == 7).all()
    if T:
        t = slice(T - 1, T)
        one = torch.full_like(keys[:1], 7.0), torch.full_like(keys[:1], 7.0)
        alone = ops.rope_to_cache(qkv[t], tables[0][t], tables[1][t], *norms, index[:1] * 0, *one)
        same(alone[0], q[-1])
        same(one[0][0], keys[index[-1]])


def attention(d: Draw) -> None:
    B, Q, S = d.among((0, 1, 2, 3)), d.among((0, 1, 2, 5, 9)), d.among((1, 2, 15, 17, 130, 300))
    kv_heads, group = d.among((1, 2, 3)), d.among((1, 2, 4, 7, 25))
    D, Dv = d.among(WIDTHS[1:16]), d.among(WIDTHS[1:16])
    q = d.any_layout(B, Q, kv_heads * group, D)
    # [rows, S, Hkv, D], in memory by heads.
    k, v = (d.flat(B + 1, kv_heads, S, n).transpose(1, 2) for n in (D, Dv))
    positions, rows = d.below(S + 1, B, Q) - 1, d.below(B + 1, B)
    window = d.among((0, 0, 1, 5, 200))
    sinks = d.flat(kv_heads * group) if d.chance(0.3) else None
    out = ops.ragged_attention(q, k, v, positions, 0.3, window=window, sinks=sinks, rows=rows)
    assert out.shape == (B, Q, kv_heads * group, Dv)
    assert (out[positions < 0] == 0).all()
    if B * Q == 0:
        return
    b, j = d.among(range(B)), d.among(range(Q))
    query, place = q[b : b + 1, j : j + 1], positions[b : b + 1, j : j + 1]
    last, row = int(place), rows[b]
    alone = ops.ragged_attention(
        *(query, k, v, place, 0.3), window=window, sinks=sinks, rows=rows[b : b + 1]
    )
    same(alone[0, 0], out[b, j])
    seen = slice(max(0, last - window + 1) if window else 0, last + 1)

    def exact(q, k, v, sinks):
        scores = torch.einsum("hd,shd->hs", q, k.repeat_interleave(group, 1)) * 0.3
        weights = torch.cat([scores, sinks[:, None]], 1).softmax(-1)[:, :-1]
        return torch.einsum("hs,shd->hd", weights, v.repeat_interleave(group, 1))

    if last >= 0:
        sunk = torch.full((kv_heads * group,), -float("inf")) if sinks is None else sinks
        d.close(out[b, j], exact, q[b, j], k[row, seen], v[row, seen], sunk)


def layers(d: Draw) -> None:
    B, Q, S, D = d.among((1, 2, 5)), d.among((1, 3)), 9, d.among((2, 8, 18, 64))
    heads, kv_heads, I, V = d.among((2, 4)), d.among((1, 2)), d.among((1, 20, 33)), 11
    H = d.among((1, 8, 33, 70))
    quantised, rounds = d.chance(0.4), d.chance()  # rounds: activations to eight bits
    D, H, I = (16, 64, 96) if quantised else (D, H, I)
    ones = torch.ones(H, dtype=d.dtype)
    shapes = {"qkv": ((heads + 2 * kv_heads) * D, H), "out": (H, heads * D), "head": (V, H)}
    shapes |= {"gate": (I, H), "up": (I, H), "down": (H, I)}
    window, table, embedding = d.among((0, 3)), d.flat(S, D), d.flat(V, H)
    if quantised:
        stored = {name: d.stored("int8", *shape) for name, shape in shapes.items()}
        plain = {name: dequantize(*pair, "int8", d.dtype) for name, pair in stored.items()}
    else:
        plain = {name: d.flat(*shape) for name, shape in shapes.items()}
        stored = {name: (weight, None) for name, weight in plain.items()}

    def stack_of(w: dict[str, Tensor]) -> Any:
        stack = torch.classes.moesd.LayerStack()
        attention = w["qkv"], None, None, None, w["out"], None
        stack.add_layer(*attention, ones, ones, [1e-6] * 4, 0.2, window, heads, kv_heads)
        stack.set_mlp(w["gate"], None, w["up"], None, w["down"], None, "silu")
        return stack

    given = {name: weight for name, (weight, _) in stored.items()}
    stack = stack_of(given)
    for name, (_, scale) in stored.items():
        stack.set_format(name, scale, "int8" if quantised else "plain", rounds)
    start = d.below(S - Q - 2, B, 1)
    ids, positions, rows = d.below(V, B, Q), start + torch.arange(Q), torch.randperm(B + 1)[:B]

    def steps(of: slice, stack: Any = stack, w: dict[str, Tensor] = given) -> list[Tensor]:
        slabs = [torch.zeros(B + 1, S, kv_heads, D, dtype=d.dtype) for _ in range(2)]
        return stack.continue_greedily(
            *(ids[of], positions[of], rows[of], embedding, ones, 1e-6, w["head"], table, table),
            *([slabs[0]], [slabs[1]], 3),
        )

    tokens, undefined = steps(slice(None))
    assert tokens.shape == undefined.shape == (B, 3) and ((tokens >= 0) & (tokens < V)).all()
    if not (quantised and rounds):
        for both in zip(
            (tokens, undefined), steps(slice(None), stack_of(plain), plain), strict=True
        ):
            assert torch.equal(*both)
    for all_of_them, alone in zip((tokens, undefined), steps(slice(B - 1, B)), strict=True):
        assert torch.equal(all_of_them[-1:], alone)


OPS = (*LINEAR, norms, activations, router, argmax, race, rotary, attention, *EXPERTS)
OPS += (layers, *RECURRENT)


@pytest.fixture(autouse=True)
def _native():
    reason = ops.unavailable()
    if reason is not None:
        (pytest.fail if "MOESD_SANITIZE" in os.environ else pytest.skip)(reason)
    try:
        ops.isa()
    except RuntimeError as error:  # MOESD_CPU_ISA names a set that this processor lacks
        if "is not supported by this processor" not in str(error):
            raise
        pytest.skip(str(error))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@torch.no_grad()
def test_calls(op):
    for seed in range(CALLS):
        draw = Draw(seed)
        torch.set_num_threads(draw.among((1, 2, 3)))
        try:
            op(draw)
            for tensor, copy in draw.tensors:
                same(tensor, copy)
        except Exception as error:
            error.add_note(f"call {seed} of {op.__name__}, {draw.dtype}, extreme={draw.extreme}")
            raise

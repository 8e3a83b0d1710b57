"""Random calls of every native op: odd sizes, views at odd places, extreme values.

Whatever the values, a result has the right shape, each of its rows is the one that the row has when
computed alone, bit for bit, and no argument has changed. Ordinary values are also held to fp64.
Tensors end where their storage ends, so that a sanitizer sees a step beyond
(``make test-sanitized``: more calls, on each instruction set).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesd_kernels import fused_experts
from moesd_kernels.dense import ops
from moesd_kernels.experts.spec.activations import FUNCTIONS

CALLS = int(os.environ.get("MOESD_FUZZ_CALLS", "60"))  # of each op
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXTREMES = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 65504.0, -0.0]
COUNTS = (0, 1, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 25, 33, 49)
WIDTHS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 250, 257, 800, 1025)


class Draw:
    """The arguments of one call."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = self.among(DTYPES)
        self.extreme = self.chance(0.3)
        self.tensors: list[tuple[Tensor, Tensor]] = []  # drawn, and a copy

    def among(self, values: Any) -> Any:
        return self._random.choice(values)

    def chance(self, probability: float = 0.5) -> bool:
        return self._random.random() < probability

    def below(self, stop: int, *shape: int) -> Tensor:
        return torch.randint(stop, shape, generator=self._generator)

    def flat(self, *shape: int, scale: float = 1.0) -> Tensor:
        """A contiguous tensor that may begin inside its storage, and ends where that ends."""
        offset = self.among((0, 0, 1, 3))
        size = torch.Size(shape).numel()
        storage = torch.randn(offset + size, generator=self._generator).mul_(scale)
        if self.extreme and size:
            places = self.below(offset + size, 1 + size // 50)
            storage[places] = torch.tensor([self.among(EXTREMES) for _ in places])
        return self._kept(storage.to(self.dtype)[offset:].view(shape))

    def any_layout(self, *shape: int) -> Tensor:
        """The same, or a view of every second column, or of a transposed tensor."""
        kind = self.among(("flat", "flat", "spread", "turned"))
        if kind == "flat" or len(shape) < 2:
            return self.flat(*shape)
        if kind == "spread":
            return self._kept(self.flat(*shape[:-1], 2 * shape[-1])[..., ::2])
        return self._kept(self.flat(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2))

    def _kept(self, tensor: Tensor) -> Tensor:
        self.tensors.append((tensor, tensor.clone()))
        return tensor

    def close(self, actual: Tensor, exact: Callable[..., Tensor], *tensors: Tensor) -> None:
        """Ordinary values are near ``exact`` of the tensors, at the scale of its largest value."""
        assert actual.dtype == self.dtype
        if self.extreme or not actual.numel():
            return
        expected = exact(*(tensor.double() for tensor in tensors))
        assert actual.shape == expected.shape
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
        assert error <= 16 * torch.finfo(self.dtype).eps, error


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def linear(d: Draw) -> None:
    T, K, N = d.among(COUNTS), d.among(WIDTHS), d.among((*COUNTS, *WIDTHS))
    x, w = d.any_layout(T, K), d.flat(N, K, scale=max(K, 1) ** -0.5)
    bias = d.any_layout(N) if d.chance() else None
    out = ops.linear(x, w, bias)
    assert out.shape == (T, N)
    shift = torch.zeros(N) if bias is None else bias
    d.close(out, lambda x, w, b: x @ w.T + b, x, w, shift)
    if T:
        t = d.among(range(T))
        same(ops.linear(x[t : t + 1], w, bias)[0], out[t])


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


def experts(d: Draw) -> None:
    T, H, I = d.among(COUNTS), d.among(WIDTHS[1:]), d.among(WIDTHS[1:16])
    E, K = d.among((1, 2, 5, 9)), d.among((1, 2, 3, 8))
    gated, transposed = d.chance(0.8), d.chance(0.3)
    width = 2 * I if gated else I
    sizes = (E, H, width) if transposed else (E, width, H)
    gate_up = d.flat(*sizes, scale=H**-0.5)
    down = d.flat(*((E, I, H) if transposed else (E, H, I)), scale=I**-0.5)
    options: dict[str, Any] = {"gated": gated, "transposed": transposed}
    if gated:
        options["interleaved"] = d.chance(0.3)
        options["activation_limit"] = d.among((None, 7.0))
        options["activation_alpha"] = d.among((None, None, 1.702))
    if not options.get("activation_alpha"):
        options["activation"] = d.among(tuple(FUNCTIONS))
    if d.chance(0.3):
        options["gate_up_bias"], options["down_bias"] = d.flat(E, width), d.flat(E, H)
    x = d.any_layout(T, H)
    ids = d.below(E + 2, T, K) - 1  # -1 and E are no experts
    ids = ids.int() if d.chance() else ids
    weights = torch.rand(T, K).to(d.among((d.dtype, torch.float32)))
    call = lambda rows, **backend: fused_experts(
        *(x[rows], gate_up, down, ids[rows], weights[rows]), **options, **backend
    )
    out = call(slice(None), backend="cpu")
    assert out.shape == (T, H)
    if T:
        t = d.among(range(T))
        same(call(slice(t, t + 1), backend="cpu")[0], out[t])
    if not d.extreme and T:
        expected = call(slice(None), backend="reference").double()
        error = (out.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
        assert error <= 16 * torch.finfo(d.dtype).eps, error


def layers(d: Draw) -> None:
    B, Q, S, D = d.among((1, 2, 5)), d.among((1, 3)), 9, d.among((2, 8, 18, 64))
    heads, kv_heads, I, V = d.among((2, 4)), d.among((1, 2)), d.among((1, 20, 33)), 11
    H = d.among((1, 8, 33, 70))
    ones = torch.ones(H, dtype=d.dtype)
    stack = torch.classes.moesd.LayerStack()
    joined, back = d.flat((heads + 2 * kv_heads) * D, H), d.flat(H, heads * D)
    stack.add_layer(
        *(joined, None, None, None, back, None, ones, ones, [1e-6] * 4, 0.2),
        *(d.among((0, 3)), heads, kv_heads),
    )
    stack.set_mlp(d.flat(I, H), None, d.flat(I, H), None, d.flat(H, I), None, "silu")
    table, embedding = d.flat(S, D), d.flat(V, H)
    start = d.below(S - Q - 2, B, 1)
    ids, positions, rows = d.below(V, B, Q), start + torch.arange(Q), torch.randperm(B + 1)[:B]

    def steps(of: slice) -> tuple[Tensor, Tensor]:
        slabs = [torch.zeros(B + 1, S, kv_heads, D, dtype=d.dtype) for _ in range(2)]
        return stack.continue_greedily(
            *(ids[of], positions[of], rows[of], embedding, ones, 1e-6, embedding, table, table),
            *([slabs[0]], [slabs[1]], 3),
        )

    tokens, undefined = steps(slice(None))
    assert tokens.shape == undefined.shape == (B, 3) and ((tokens >= 0) & (tokens < V)).all()
    for all_of_them, alone in zip((tokens, undefined), steps(slice(B - 1, B)), strict=True):
        assert torch.equal(all_of_them[-1:], alone)


OPS = (linear, norms, activations, router, argmax, rotary, attention, experts, layers)


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

"""Random calls of the operators of recurrent layers: any split of a row's tokens gives the same."""

from __future__ import annotations

import torch
from support.fuzz import Draw, same
from support.recurrent import REFERENCES, Call
from torch import Tensor

from moesd_kernels.dense import recurrent
from moesd_kernels.dense.recurrent.convolution import short_convolution as reference
from moesd_kernels.dense.recurrent.gated_norm import gated_rms_norm

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 128, 130)


def delta_rule(d: Draw) -> None:
    B, Q, Hk, group = d.among((0, 1, 2, 3)), d.among((0, 1, 2, 5)), d.among((1, 2)), d.among((1, 3))
    Hv, Dk, Dv = Hk * group, d.among(SIZES), d.among(SIZES)
    tokens = d.any_layout(B, Q, Hk, Dk), d.any_layout(B, Q, Hk, Dk), d.any_layout(B, Q, Hv, Dv)
    decay = d.flat(B, Q, Hv, *([Dk] if d.chance() else [])).abs().neg()
    inputs = *tokens, decay, d.any_layout(B, Q, Hv).sigmoid()
    _ragged(d, "gated_delta_rule", inputs, (Hv, Dk, Dv), tokens[2].shape)


def mamba2(d: Draw) -> None:
    B, Q, G, group = d.among((0, 1, 2, 3)), d.among((0, 1, 2, 5)), d.among((1, 2)), d.among((1, 3))
    Hh, P, N = G * group, d.among(SIZES), d.among(SIZES)
    x, to_state, from_state = (d.any_layout(B, Q, *s) for s in ((Hh, P), (G, N), (G, N)))
    dt, A = d.any_layout(B, Q, Hh).sigmoid(), d.flat(Hh).abs().neg()
    inputs = x, dt, A, to_state, from_state, d.flat(Hh)
    _ragged(d, "selective_state_update", inputs, (Hh, P, N), x.shape)


def mamba(d: Draw) -> None:
    B, Q, channels, N = d.among((0, 1, 2, 3)), d.among((0, 1, 2, 5)), d.among(SIZES), d.among(SIZES)
    x, to_state, from_state = (d.any_layout(B, Q, n) for n in (channels, N, N))
    dt, A = d.any_layout(B, Q, channels).sigmoid(), d.flat(channels, N).abs().neg()
    inputs = x, dt, A, to_state, from_state, d.flat(channels)
    _ragged(d, "selective_scan", inputs, (channels, N), x.shape)


def _ragged(
    d: Draw, name: str, inputs: tuple[Tensor, ...], state: tuple[int, ...], shape: torch.Size
) -> None:
    """One call; one of its rows alone, token by token; and the fp64 of ordinary values."""
    B, Q = shape[:2]
    counts = d.below(Q + 1, B)
    keep = d.below(Q + 1, B).minimum(counts)
    rows = d.below(2**30, B + 2).argsort()[:B]
    # The states end where their storage ends, too.
    states = d.flat(B + 2, *state).to(torch.float32, copy=True)
    call, function = Call(name, inputs, states, (rows, keep, counts)), getattr(recurrent, name)
    out, after = call.run(function)
    assert out.shape == shape and out.dtype == d.dtype
    unnamed = torch.ones(B + 2, dtype=torch.bool).index_fill(0, rows, False)
    same(after[unnamed], states[unnamed])
    if B == 0:
        return
    b = d.among(range(B))
    assert (out[b, int(counts[b]) :] == 0).all()
    if keep[b] == 0:
        same(after[rows[b]], states[rows[b]])
    alone = states
    for t in range(int(counts[b])):
        one, alone = call._replace(states=alone).tokens(b, t, t + 1, 1).run(function)
        same(one[0, 0], out[b, t])
        if t + 1 == keep[b]:
            same(alone[rows[b]], after[rows[b]])
    if not d.extreme:
        exact, _ = call.double().run(REFERENCES[name])
        d.close(out, lambda: exact)


def convolution(d: Draw) -> None:
    B, Q, C, W = (
        d.among((0, 1, 3)),
        d.among((0, 1, 2, 9)),
        d.among(SIZES),
        d.among((1, 2, 3, 4, 32)),
    )
    window, weight = d.any_layout(B, W - 1 + Q, C), d.flat(C, W)
    bias, activation = d.flat(C) if d.chance() else None, d.among((None, "silu", "relu2"))
    out = recurrent.short_convolution(window, weight, bias, activation)
    assert out.shape == (B, Q, C)
    if B * Q:
        b, t = d.among(range(B)), d.among(range(Q))
        alone = recurrent.short_convolution(window[b, t : t + W][None], weight, bias, activation)
        same(alone[0, 0], out[b, t])
    shift = torch.zeros(C) if bias is None else bias
    d.close(out, lambda *tensors: reference(*tensors, activation), window, weight, shift)


def gated_norm(d: Draw) -> None:
    T, groups, group = d.among((0, 1, 2, 7)), d.among((1, 2, 3)), d.among((*SIZES, 1025))
    x, gate = d.any_layout(T, groups * group), d.any_layout(T, groups * group)
    w = d.flat(d.among((group, groups * group)))
    rule = {"gate_first": d.chance(), "cast_first": d.chance()}
    rule |= {"activation": d.among(("silu", "sigmoid")), "group": group}
    out = recurrent.gated_rms_norm(x, gate, w, 1e-6, **rule)
    assert out.shape == x.shape
    d.close(out, lambda *tensors: gated_rms_norm(*tensors, 1e-6, **rule), x, gate, w)
    if T:
        t = d.among(range(T))
        same(recurrent.gated_rms_norm(x[t], gate[t], w, 1e-6, **rule), out[t])


RECURRENT = (delta_rule, mamba2, mamba, convolution, gated_norm)

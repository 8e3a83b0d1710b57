"""Random calls of the linear layer: plain weights, stored ones, and rounded activations."""

from __future__ import annotations

import torch
from support.formats import INTEGERS, QUANTISED
from support.fuzz import COUNTS, WIDTHS, Draw, same

from moesd_kernels.dense import ops
from moesd_kernels.formats import activation_group, dequantize, round_to_int8


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


def stored_linear(d: Draw) -> None:
    """Weights of any format, to the bit the plain ones of the same values."""
    name, T = d.among(QUANTISED), d.among(COUNTS)
    K, N = d.depth(name, d.among((*WIDTHS, 1800))), d.among((*COUNTS, *WIDTHS))
    x, bias = d.any_layout(T, K), d.any_layout(N) if d.chance() else None
    w, scale = d.stored(name, N, K)
    out = ops.linear(x, w, bias, scale=scale, weight_format=name)
    same(out, ops.linear(x, dequantize(w, scale, name, d.dtype), bias))
    same(ops.linear(x[-1:], w, bias, scale=scale, weight_format=name), out[-1:])


def int8_linear(d: Draw) -> None:
    """Activations of eight bits, times weights of any format of integers."""
    name, T = d.among(INTEGERS), d.among((*COUNTS, 130))
    K, N = d.depth(name, d.among((*WIDTHS, 1800))), d.among((*COUNTS, *WIDTHS))
    x, bias = d.any_layout(T, K), d.any_layout(N) if d.chance() else None
    w, scale = d.stored(name, N, K)
    form = {"scale": scale, "weight_format": name, "int8_activations": True}
    out = ops.linear(x, w, bias, **form)
    assert out.shape == (T, N)
    shift = torch.zeros(N) if bias is None else bias
    values = dequantize(w, scale, name, torch.float32)
    group = activation_group(name, scale, K)
    d.close(out, lambda x, w, b: round_to_int8(x, group).double() @ w.T + b, x, values, shift)
    some = slice(d.among(range(T)) if T else 0, None)
    same(ops.linear(x[some], w, bias, **form), out[some])
    same(ops.linear(x[-1:], w, bias, **form), out[-1:])


LINEAR = (linear, stored_linear, int8_linear)

"""Random calls of the experts layer: plain weights, stored ones, and rounded activations."""

from __future__ import annotations

from typing import Any

import torch
from support.formats import INTEGERS, QUANTISED
from support.fuzz import COUNTS, WIDTHS, Draw, same
from torch import Tensor

from moesd_kernels import fused_experts
from moesd_kernels.experts.spec.activations import FUNCTIONS
from moesd_kernels.formats import dequantize

Options = dict[str, Any]


def experts(d: Draw) -> None:
    T, H, I = d.among(COUNTS), d.among(WIDTHS[1:]), d.among(WIDTHS[1:16])
    E, K = d.among((1, 2, 5, 9)), d.among((1, 2, 3, 8))
    gated, transposed = d.chance(0.8), d.chance(0.3)
    width = 2 * I if gated else I
    sizes = (E, H, width) if transposed else (E, width, H)
    gate_up = d.flat(*sizes, scale=H**-0.5)
    down = d.flat(*((E, I, H) if transposed else (E, H, I)), scale=I**-0.5)
    options: Options = {"gated": gated, "transposed": transposed}
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


def stored_layer(d: Draw, name: str, second: str, T: int) -> tuple[list[Tensor], Options, Options]:
    """(x, gate_up, down, ids, weights), what else the layer is, and how its weights are stored."""
    E, K = d.among((1, 2, 5)), d.among((1, 2, 3))
    H, I = d.depth(name, d.among(WIDTHS[1:])), d.depth(second, d.among(WIDTHS[1:16]))
    gated = d.chance(0.8)
    options, width = {"gated": gated, "interleaved": gated and d.chance(0.3)}, (1 + gated) * I
    (up, up_scale), (down, down_scale) = d.stored(name, E, width, H), d.stored(second, E, H, I)
    if d.chance(0.3):
        options |= {"gate_up_bias": d.flat(E, width), "down_bias": d.flat(E, H)}
    x, ids, weights = d.any_layout(T, H), d.below(E + 2, T, K) - 1, torch.rand(T, K)
    form = {"weight_format": name, "down_format": second}
    form |= {"gate_up_scale": up_scale, "down_scale": down_scale}
    return [x, up, down, ids, weights], options, form


def stored_experts(d: Draw) -> None:
    """Weights of any one or two formats, to the bit the plain ones of the same values."""
    name, T = d.among(QUANTISED), d.among(COUNTS)
    second = d.among(QUANTISED) if d.chance(0.3) else name
    (x, up, down, ids, weights), options, form = stored_layer(d, name, second, T)
    call = lambda t: fused_experts(
        *(x[t], up, down, ids[t], weights[t]), **options, **form, backend="cpu"
    )
    out = call(slice(None))
    plain = (
        dequantize(up, form["gate_up_scale"], name, d.dtype),
        dequantize(down, form["down_scale"], second, d.dtype),
    )
    same(out, fused_experts(x, *plain, ids, weights, **options, backend="cpu"))
    same(call(slice(-1, None)), out[-1:])


def int8_experts(d: Draw) -> None:
    """Activations of eight bits, times weights of any one or two formats of integers."""
    (name, second), T = (d.among(INTEGERS) for _ in range(2)), d.among((*COUNTS, 130))
    (x, up, down, ids, weights), options, form = stored_layer(d, name, second, T)
    call = lambda t, backend="cpu": fused_experts(
        *(x[t], up, down, ids[t], weights[t]),
        **(options | form | {"int8_activations": True}),
        backend=backend,
    )
    out = call(slice(None))
    assert out.shape == x.shape
    some = slice(d.among(range(T)) if T else 0, None)
    same(call(some), out[some])
    same(call(slice(-1, None)), out[-1:])
    if not d.extreme and T:
        # A sum at the edge between two codes may fall on either side.
        expected = call(slice(None), "reference").double()
        error = (out.double() - expected).norm() / expected.norm().clamp_min(1e-3)
        assert error <= 0.01 + torch.finfo(d.dtype).eps, error


EXPERTS = (experts, stored_experts, int8_experts)

"""The launch that ends a decoder layer, against the steps that it joins."""

import pytest
import torch
import torch.nn.functional as F
from support.oracle import assert_as_accurate, layer_case

from moesd_kernels.experts.triton.combine_norm import After
from moesd_kernels.experts.triton.launch import fused_experts_add_norm, fused_experts_triton

EPS = 1e-5


def after(T, H, dtype, shared):
    generator = torch.Generator().manual_seed(T)
    random = lambda *sizes: torch.randn(*sizes, generator=generator).to(dtype)
    more = (random(T, H), random(H) / H**0.5) if shared else ()
    return After(random(T, H), 1 + random(H) / 8, EPS, *more)


def steps(out, states, after, dtype):
    """The stream and its norm as transformers' modules make them, each step in ``dtype``."""
    out, states, stream, norm = (t.to(dtype) for t in (out, states, after.stream, after.norm))
    if after.shared is not None:
        gate, shared = after.gate.to(dtype), after.shared.to(dtype)
        out = out + torch.sigmoid(F.linear(states, gate[None])) * shared
    stream = stream + out
    wide = stream.to(torch.promote_types(dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return stream, norm * wide.to(dtype)


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 9])
def test_is_the_layers_end(T, dtype, shared):
    case = layer_case(7, 3, 40, 24, T, dtype)
    x, weights, routing, spec = case.as_run()
    rest = after(T, 40, dtype, shared)
    stream, normed = fused_experts_add_norm(x, weights, routing, spec, rest)
    out = fused_experts_triton(x, weights, routing, spec)
    if not shared:  # the sum over a row is a matter of order, adding two numbers is not
        assert torch.equal(stream, rest.stream + out)
    eager, exact = (steps(out, x, rest, kind) for kind in (dtype, torch.float64))
    rows = torch.arange(T)
    assert_as_accurate(stream, eager[0], exact[0], groups=rows, name="stream")
    assert_as_accurate(normed, eager[1], exact[1], groups=rows, name="normed")


def test_a_skipped_expert_adds_nothing():
    case = layer_case(4, 2, 32, 32, 3, torch.float32, ids=torch.tensor([[0, -1], [9, 9], [1, 3]]))
    case.weights[:2, 1] = float("nan")
    x, weights, routing, spec = case.as_run()
    rest = after(3, 32, torch.float32, shared=False)
    stream, normed = fused_experts_add_norm(x, weights, routing, spec, rest)
    assert torch.equal(stream, rest.stream + fused_experts_triton(x, weights, routing, spec))
    assert normed.isfinite().all()

"""Ragged attention on a GPU: against the C++ operator, a verify's bits, a captured graph.

Written without a GPU at hand; the same kernels run interpreted in ``interpreted/``.
"""

import pytest
import torch
from support.oracle import assert_as_accurate

from moesd_kernels.dense import ops
from moesd_kernels.experts.triton import unavailable_reason

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"triton: {unavailable_reason()}"),
    pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable())),
]
# Heads and widths of Qwen2-57B, Qwen3-30B, Mixtral, Qwen2-0.5B; a wide head; more rows than a tile.
SHAPES = [(28, 4, 128), (32, 4, 128), (32, 8, 128), (14, 2, 64), (8, 4, 256), (48, 1, 64)]
WIDTHS = pytest.mark.parametrize("q_heads, kv_heads, D", SHAPES)
FIRST = pytest.mark.first


def make(B, Q, q_heads, kv_heads, D, S, dtype):
    """q, k, v, positions and rows on the GPU: the longest row ends at S - 1, one query is dead."""
    q = torch.randn(B, Q, q_heads, D).to(dtype)
    k, v = torch.randn(2, B, S, kv_heads, D).to(dtype)
    start = torch.randint(0, S - Q + 1, (B, 1))
    start[-1] = S - Q
    positions = start + torch.arange(Q)
    if Q > 1:
        positions[0, -1] = -1
    return [x.cuda() for x in (q, k, v, positions, torch.randperm(B))]


@FIRST
@WIDTHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("Q, window, has_sinks", [(1, 0, False), (5, 0, True), (5, 200, False)])
def test_as_accurate_as_the_operator(q_heads, kv_heads, D, Q, window, has_sinks, dtype):
    from moesd_kernels.dense.triton.attention import ragged_attention

    q, k, v, positions, rows = make(3, Q, q_heads, kv_heads, D, 700, dtype)
    sinks = torch.randn(q_heads, device="cuda") if has_sinks else None
    options = {"window": window, "sinks": sinks, "rows": rows}
    actual = ragged_attention(q, k, v, positions, D**-0.5, **options).cpu()
    options = {
        "window": window,
        "sinks": None if sinks is None else sinks.cpu(),
        "rows": rows.cpu(),
    }
    places = positions.cpu(), D**-0.5
    baseline = ops.ragged_attention(q.cpu(), k.cpu(), v.cpu(), *places, **options)
    wide = (x.float().cpu() for x in (q, k, v))  # fp32 is exact enough beside 16 bits
    exact = ops.ragged_attention(*wide, *places, **options).double()
    assert_as_accurate(actual, baseline, exact, name="attention")


@FIRST
@WIDTHS
@pytest.mark.parametrize("window", [0, 200])
def test_a_verify_is_single_steps(monkeypatch, q_heads, kv_heads, D, window):
    from moesd_kernels.dense.triton import attention

    q, k, v, positions, rows = make(3, 5, q_heads, kv_heads, D, 700, torch.bfloat16)

    def call(b, j, **options):
        return attention.ragged_attention(
            q[b, j], k, v, positions[b, j], D**-0.5, window, None, rows[b], **options
        )

    everything = slice(None), slice(None)
    verify = call(*everything)
    assert torch.equal(call(*everything, length=10**6), verify)
    for programs in (None, 1, 2, 6):
        if programs is not None:
            monkeypatch.setattr(attention, "num_programs", lambda *_, n=programs: n)
            assert torch.equal(call(*everything), verify)
        for b in range(3):
            for j in range(5):
                alone = call(slice(b, b + 1), slice(j, j + 1))
                assert torch.equal(alone[0, 0], verify[b, j]), (b, j, programs)


@FIRST
def test_a_captured_graph_follows_positions_and_cache():
    from moesd_kernels.dense.triton.attention import ragged_attention

    q, k, v, positions, rows = make(4, 2, 28, 4, 128, 700, torch.bfloat16)
    call = lambda: ragged_attention(q, k, v, positions, 0.1, rows=rows)
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    positions.copy_(torch.randint(0, 700, positions.shape))
    rows.copy_(rows.flip(0))
    k.neg_()
    graph.replay()
    assert torch.equal(captured, call())

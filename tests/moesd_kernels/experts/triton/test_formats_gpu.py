"""Quantised weights on a GPU: precision, rows that do not depend on the batch, graphs.

Not run on a GPU yet; the same kernels run interpreted in ``interpreted/test_formats.py``.
"""

import pytest
import torch
from support.formats import quantised_case
from support.oracle import Case, check_rows

from moesd_kernels.experts.triton import fused_experts_triton, unavailable_reason
from moesd_kernels.experts.triton.types import LayerTiles, TileConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(unavailable_reason() is not None, reason=f"triton: {unavailable_reason()}"),
]
FORMATS = ["fp8_block", "mxfp4", "int8", "int4"]


def on_gpu(case):
    move = lambda value: value.cuda() if isinstance(value, torch.Tensor) else value
    return Case(
        tuple(map(move, case.tensors)), {name: move(value) for name, value in case.options.items()}
    )


def cases(name, T, dtype=torch.bfloat16, **options):
    """Quantised and plain: experts whose depth no step divides."""
    return map(on_gpu, quantised_case(name, T, 4, 16, 320, 192, dtype, group=64, **options))


@pytest.mark.parametrize("T", [1, 5, 64, 300])
@pytest.mark.parametrize("name", FORMATS)
def test_matches_oracle(name, T):
    stored, plain = cases(name, T)
    check_rows(plain, stored.run(fused_experts_triton))


@pytest.mark.parametrize("name", FORMATS)
def test_options_of_gpt_oss_in_fp16(name):
    options = {"interleaved": True, "bias": True, "activation_limit": 7.0}
    stored, plain = cases(name, 9, torch.float16, activation_alpha=1.702, **options)
    check_rows(plain, stored.run(fused_experts_triton))


@pytest.mark.parametrize("swap_ab", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_equals_plain_kernels_on_the_numbers(name, swap_ab):
    """Every subnormal and every rounding of the hardware's bf16 is the definition's."""
    tile = TileConfig(16, 64, 64, swap_ab=swap_ab)
    config = LayerTiles(tile, tile, None, TileConfig(16, 8, 256))
    stored, plain = cases(name, 40)
    got = stored.run(fused_experts_triton, config=config)
    assert torch.equal(got, plain.run(fused_experts_triton, config=config))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_do_not_depend_on_the_batch(name):
    stored, _ = cases(name, 300)
    whole = stored.run(fused_experts_triton, batch_invariant=True)
    for rows in (1, 2, 33, 130):
        part = stored.rows(slice(rows)).run(fused_experts_triton, batch_invariant=True)
        assert torch.equal(part, whole[:rows])


@pytest.mark.parametrize("T", [1, 16])
def test_graph(T):
    stored, plain = cases("mxfp4", T)
    out = torch.empty_like(stored.x)
    stored.run(fused_experts_triton, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stored.run(fused_experts_triton, out=out)
    out.fill_(float("nan"))
    graph.replay()
    check_rows(plain, out)

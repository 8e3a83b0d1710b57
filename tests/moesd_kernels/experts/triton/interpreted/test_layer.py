"""The whole layer, interpreted, against the fp64 oracle."""

import pytest
import torch
from support.oracle import check_rows, layer_case

from moesd_kernels.experts.triton import fused_experts_triton
from moesd_kernels.experts.triton.types import LayerTiles, TileConfig

SMALL = TileConfig(block_m=16, block_n=32, block_k=32)
CONFIG = LayerTiles(gate_up=SMALL, down=SMALL, single_gate_up=SMALL, single_down=SMALL)

SHAPES = [
    # E, K, H, I, T, why
    (4, 2, 32, 32, 0, "no tokens"),
    (4, 2, 32, 32, 1, "one token: two launches"),
    (7, 3, 33, 17, 1, "one token: every mask"),
    (3, 1, 70, 40, 1, "one token of one expert"),
    (4, 2, 64, 32, 5, "fewer tokens than a block"),
    (7, 3, 33, 17, 9, "prime E, odd H and I: every mask"),
    (4, 1, 32, 48, 6, "K = 1"),
    (3, 3, 32, 32, 4, "K = E: every expert gets every token"),
    (32, 2, 16, 16, 3, "mostly empty experts"),
    (2, 1, 32, 32, 40, "more rows per expert than a block"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("E", "K", "H", "I", "T", "why"), SHAPES, ids=[s[-1] for s in SHAPES])
def test_matches_oracle(E, K, H, I, T, why, dtype):
    case = layer_case(E, K, H, I, T, dtype)
    check_rows(case, case.run(fused_experts_triton, config=CONFIG))


def test_one_token_through_the_matrix_product():
    case = layer_case(5, 3, 48, 40, 1)
    config = LayerTiles(SMALL, SMALL, single_gate_up=None, single_down=SMALL)
    check_rows(case, case.run(fused_experts_triton, config=config))


@pytest.mark.parametrize("T", [1, 4])
def test_selected_configuration(T):
    case = layer_case(4, 2, 64, 64, T)
    check_rows(case, case.run(fused_experts_triton))


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([[1, 1], [1, 1], [1, 1]], "all tokens to one expert, twice each"),
        ([[0, 2], [2, 2], [0, 0]], "duplicate ids in a row"),
        ([[-1, 2], [4, 1], [0, 3]], "ids below 0 and at E"),
        ([[-1, 4], [2, 1], [-5, 100]], "a token with no expert here"),
        ([[4, 4], [-1, -1], [7, 9]], "no expert here at all"),
        ([[4, 1]], "one token, one expert elsewhere"),
        ([[3, 3]], "one token, one expert twice"),
        ([[-1, 9]], "one token, no expert here"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
def test_routing(ids, why, integer):
    ids = torch.tensor(ids, dtype=integer)
    case = layer_case(4, 2, 32, 32, len(ids), ids=ids)
    # A weight that is never used may hold anything.
    case.weights[(ids < 0) | (ids >= 4)] = float("nan")
    check_rows(case, case.run(fused_experts_triton, config=CONFIG))


@pytest.mark.parametrize("inline_pairs", [0, 4, 74])
def test_plan_of_its_own_or_inline(inline_pairs):
    """37 tokens of two experts each; several blocks of an expert in groups."""
    grouped = TileConfig(block_m=16, block_n=32, block_k=32, group_m=3)
    case = layer_case(3, 2, 48, 80, 37)
    config = LayerTiles(grouped, grouped, SMALL, SMALL, inline_pairs)
    check_rows(case, case.run(fused_experts_triton, config=config))


def test_more_pairs_than_a_plan_holds(monkeypatch):
    from moesd_kernels.experts.triton import launch

    monkeypatch.setattr(launch, "MAX_PAIRS", 8)
    case = layer_case(5, 2, 32, 32, 11)
    check_rows(case, case.run(fused_experts_triton, config=CONFIG))


def test_strided_arguments():
    """Rows with a stride of their own, ids and weights that are views, a strided ``out``."""
    case = layer_case(5, 2, 32, 32, 6)
    x = torch.randn(6, 64)
    x[:, :32] = case.x
    ids, weights = (t.T.contiguous().T for t in (case.ids, case.weights))
    out = torch.full((32, 6), float("nan")).T
    strided = case.on(x[:, :32], ids, weights)
    got = strided.run(fused_experts_triton, config=CONFIG, out=out)
    assert got is out
    check_rows(case, got)


def test_bfloat16_routing_weights():
    case = layer_case(5, 2, 32, 32, 6)
    case = case.rows(slice(None))
    weights = case.weights.bfloat16()
    got = case.on(case.x, case.ids, weights).run(fused_experts_triton, config=CONFIG)
    case.weights.copy_(weights)
    check_rows(case, got)

"""The routing plan: a stable sort by expert, cut into blocks; exact equality throughout."""

from __future__ import annotations

import itertools

import pytest
import torch

from moesd_kernels import plan_routing
from moesd_kernels.experts.routing import max_blocks

# (T, K, E, block size), each with the reason it is here.
CASES = [
    pytest.param(0, 2, 4, 8, id="no-tokens"),
    pytest.param(1, 2, 4, 8, id="one-token"),
    pytest.param(5, 1, 7, 1, id="K1-block1-prime-E"),
    pytest.param(16, 4, 4, 8, id="K-equals-E"),
    pytest.param(3, 2, 64, 16, id="most-experts-empty"),
    pytest.param(100, 3, 5, 16, id="several-blocks-per-expert"),
]


def naive(topk_ids, num_experts):
    """Pairs of each expert, in order."""
    flat = topk_ids.flatten().tolist()
    return [[p for p, e in enumerate(flat) if e == expert] for expert in range(num_experts)]


def check(topk_ids, num_experts, block_size):
    plan = plan_routing(topk_ids, num_experts, block_size)
    lists = naive(topk_ids, num_experts)
    offsets = plan.expert_offsets.tolist()
    assert [b - a for a, b in itertools.pairwise(offsets)] == [len(p) for p in lists]
    kept = offsets[-1]
    assert plan.sorted_to_pair.tolist()[:kept] == [p for pairs in lists for p in pairs]
    for pair, row in enumerate(plan.pair_to_sorted.tolist()):
        expert = topk_ids.flatten()[pair].item()
        if 0 <= expert < num_experts:
            assert plan.sorted_to_pair[row] == pair
        else:
            assert row == -1
    blocks = [
        (expert, offsets[expert] + start)
        for expert, pairs in enumerate(lists)
        for start in range(0, len(pairs), block_size)
    ]
    experts, rows = plan.block_to_expert.tolist(), plan.block_to_row.tolist()
    assert list(zip(experts, rows, strict=True))[: len(blocks)] == blocks
    assert set(experts[len(blocks) :]) <= {-1}
    assert len(experts) == max_blocks(topk_ids.numel(), num_experts, block_size)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("T", "K", "E", "block"), CASES)
def test_plan(T, K, E, block, dtype):
    check(torch.randint(0, E, (T, K)).to(dtype), E, block)


def test_all_tokens_to_one_expert():
    check(torch.full((40, 1), 3), 8, 16)


def test_out_of_range_ids_are_dropped():
    ids = torch.tensor([[0, -1], [4, 3], [99, 1]])
    check(ids, 4, 2)
    assert plan_routing(ids, 4, 2).expert_offsets[-1] == 3


def test_duplicates_in_a_row_are_kept():
    check(torch.tensor([[2, 2], [2, 0]]), 3, 2)


def test_block_bound_is_reached():
    """One expert per pair but the last, which holds the rest: no routing needs more blocks."""
    ids = torch.tensor([[0], [1], [2], *[[3]] * 9])
    plan = plan_routing(ids, 4, 4)
    assert (plan.block_to_expert >= 0).all()


def test_non_contiguous_ids():
    check(torch.randint(0, 5, (3, 12)).T[:, :2], 5, 4)


def test_shapes_do_not_depend_on_the_data():
    shapes = {
        tuple(tuple(part.shape) for part in plan_routing(torch.full((9, 2), e), 6, 4))
        for e in (-1, 0, 5)
    }
    assert len(shapes) == 1


def test_compiles_without_graph_breaks():
    compiled = torch.compile(plan_routing, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (3, 8):
        ids = torch.randint(-1, 6, (T, 2))
        for actual, expected in zip(compiled(ids, 5, 4), plan_routing(ids, 5, 4), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("ids", "E", "block", "error", "message"),
    [
        (torch.zeros(3, 2), 4, 8, TypeError, "got torch.float32"),
        (torch.zeros(3, dtype=torch.long), 4, 8, ValueError, r"got shape \(3,\)"),
        (torch.zeros(3, 2, dtype=torch.long), 0, 8, ValueError, "num_experts=0"),
        (torch.zeros(3, 2, dtype=torch.long), 4, 0, ValueError, "block_size=0"),
    ],
)
def test_errors(ids, E, block, error, message):
    with pytest.raises(error, match=message):
        plan_routing(ids, E, block)

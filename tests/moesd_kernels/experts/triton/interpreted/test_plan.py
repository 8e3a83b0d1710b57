"""The plan's tables against a stable sort, and how often a weight tile is read."""

import pytest
import torch

from moesd_kernels.experts.triton import plan_kernel
from moesd_kernels.experts.triton.config import READ_ONCE_TOKENS, block_rows
from moesd_kernels.experts.triton.plan_kernel import max_blocks, plan
from moesd_kernels.experts.triton.types import LayerShape


def rows_by_block(ids, E, block_m):
    """Launch the plan; {block: (expert, its pairs)} of the blocks in use."""
    sorted_to_pair, blocks = plan(ids, E, block_m)
    used = {}
    for number, (e, first, rows) in enumerate(blocks.tolist()):
        if e >= 0:
            used[number] = (e, sorted_to_pair[first : first + rows].tolist())
    return used


@pytest.mark.parametrize(
    ("E", "K", "T", "block_m", "why"),
    [
        (7, 3, 11, 16, "prime E, one block each"),
        (5, 2, 60, 16, "several blocks of an expert"),
        (40, 2, 3, 16, "more experts than pairs"),
        (1, 1, 33, 16, "one expert"),
        (5, 3, 90, 16, "three chunks of ids, the last not full"),
    ],
)
def test_plan_is_a_stable_sort(E, K, T, block_m, why, monkeypatch):
    monkeypatch.setattr(plan_kernel, "CHUNK", 128)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, E + 1, (T, K), generator=generator)
    expected = {e: (ids.flatten() == e).nonzero().flatten().tolist() for e in range(E)}
    got = {e: [] for e in range(E)}
    used = rows_by_block(ids, E, block_m)
    assert list(used) == list(range(len(used))), "idle blocks come last"
    for e, pairs in used.values():
        assert 1 <= len(pairs) <= block_m
        got[e] += pairs
    assert got == expected
    assert [e for e, _ in used.values()] == sorted(e for e, _ in used.values())


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, READ_ONCE_TOKENS])
def test_each_weight_tile_is_read_once(T):
    """Even when every token picks the same experts; a program reads its block's tile, once."""
    E, K = 6, 2
    worst = torch.tensor([[1, 4]]).expand(T, K).contiguous()
    spread = torch.rand(T, E, generator=torch.Generator().manual_seed(T)).topk(K).indices
    block_m = block_rows(LayerShape(E, K, 64, 64, T))
    for ids in (worst, spread):
        experts = [e for e, _ in rows_by_block(ids, E, block_m).values()]
        assert sorted(experts) == ids.unique().tolist()


@pytest.mark.parametrize("block_m", [16, 64])
def test_bound_on_blocks_is_reached_and_never_passed(block_m):
    E = 3
    for counts in ([1, 1, block_m + 1], [block_m, block_m, 1], [2 * block_m + 1, 1, 1]):
        need = sum(-(-count // block_m) for count in counts)
        assert need <= max_blocks(sum(counts), E, block_m)
    assert max_blocks(block_m + 3, E, block_m) == 4  # counts 1, 1, block_m + 1

"""Address space of which only what is written takes memory."""

from __future__ import annotations

import mmap

import pytest
import torch

from decoder.offload.memory import ExpertMemory


@pytest.mark.parametrize("columns", [7, 1000, 1024, 1500, 4099])
def test_dropping_an_expert_leaves_its_neighbours(columns):
    """Also where experts share pages: those stay, and every page of one expert alone goes."""
    memory = ExpertMemory((9, 3, columns), torch.bfloat16)
    full = torch.arange(1, 28).view(9, 3, 1).expand(9, 3, columns).bfloat16().contiguous()
    for expert in range(9):
        memory.place(expert)[:] = memoryview(full[expert].view(torch.uint8).numpy()).cast("B")
    assert torch.equal(memory.tensor, full)
    for expert in (0, 4, 5, 8):
        memory.drop(expert)
        left = memory.tensor[expert].count_nonzero() * 2
        assert left < 2 * mmap.PAGESIZE
        assert left == 0 or 6 * columns % mmap.PAGESIZE
    kept = [1, 2, 3, 6, 7]
    assert torch.equal(memory.tensor[kept], full[kept])

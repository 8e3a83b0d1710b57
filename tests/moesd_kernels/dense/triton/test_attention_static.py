"""Ragged attention compiled without a GPU: no spills, wide copies, one order of sums."""

import pytest
from support.device.compiled import code_problems, title


def test_compiled_kernels(facts_of):
    facts = facts_of("attention_child.py")
    assert {fact["arch"] for fact in facts} == {80, 90, 100} and len(facts) == 11
    problems = [problem for fact in facts for problem in problems_of(fact)]
    assert not problems, "\n".join(problems)
    for arch in (80, 90, 100):
        split, whole = (
            next(f["reductions"] for f in facts if (f["arch"], f["split"]) == (arch, split))
            for split in (True, False)
        )
        assert len(split) == 3 and split == whole, f"sm_{arch}: {split}, {whole}"


@pytest.mark.parametrize(("shared_bytes", "stages"), [(232448, 3), (166912, 2), (101376, 1)])
def test_blocks_held_follow_from_shared_memory(shared_bytes, stages):
    pytest.importorskip("triton")
    from moesd_kernels.dense.triton.attention import num_stages

    assert num_stages(32, 128, 256, shared_bytes) == stages


def problems_of(fact):
    """What is wrong with one compiled kernel, in words."""
    name = title(fact)
    yield from code_problems(fact)
    if fact["shared"] > fact["shared_limit"]:
        yield f"{name}: {fact['shared']} bytes of shared memory, limit {fact['shared_limit']}"
    if fact["kernel"] == "attend":
        # The instruction of 16 rows, whatever the tile: see Plan.
        if fact["mma"] != ["mma.sync"]:
            yield f"{name}: matrix instructions {fact['mma']}, expected mma.sync"
        if fact["copy_bytes"] != [16]:
            yield f"{name}: copies of {fact['copy_bytes']} bytes, expected only 16"

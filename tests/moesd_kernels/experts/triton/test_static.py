"""Every kernel the selector can ask for, compiled without a GPU: no spills, no slow loads.

bf16, for sm_80, sm_90 and sm_100, over the layers of five published models, and a few kernels of
three with quantised weights; what tuning tries on sm_90; and every layout, gate and dtype on one
tile for sm_90, where only compiling and spills are looked at.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Tiles of 16 and 32 rows go to the warp-wide instruction on every architecture.
WIDE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.mark.parametrize("what", [*sorted(WIDE), "candidates", "variants"])
def test_compiled_kernels(what, tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = str(HERE.parents[3])
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_child.py"), str(what)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"gate_up", "down", "gate_up_single", "down_combine"}
    kernels |= set() if what == "candidates" else {"plan", "combine"}
    kernels |= {"combine_norm"} if what in WIDE else set()
    assert {fact["kernel"] for fact in facts} == kernels
    problems = [problem for fact in facts for problem in problems_of(fact, what)]
    assert not problems, "\n".join(problems)


def problems_of(fact, what):
    """What is wrong with one compiled kernel, in words."""
    name = f"{fact['kernel']} {fact['constexprs']}"
    if fact["stack"] or fact["local"]:
        yield f"{name}: spills {fact['stack']} + {fact['local']} bytes"
    if fact["shared"] > fact["shared_limit"]:
        yield f"{name}: {fact['shared']} bytes of shared memory, limit {fact['shared_limit']}"
    if "variant" in fact["constexprs"]:
        return  # chosen for their flags, not for their tiles
    arch = 90 if what == "candidates" else what
    if fact["dependent_launch"] != (arch >= 90):
        yield f"{name}: programmatic dependent launch is {fact['dependent_launch']}"
    # Before the former launch is complete: ids, routing weights and prefetches, by one kernel only.
    early = ["ld", "prefetch"] if fact["kernel"] == "down_combine" else []
    if arch >= 90 and fact["early"] != early:
        yield f"{name}: {fact['early']} before the dependency wait, expected {early}"
    if fact["kernel"] in ("gate_up", "down"):
        wide = fact["constexprs"]["BLOCK_M"] >= 64 or fact["constexprs"]["SWAP_AB"]
        expected = [WIDE[arch] if wide else "mma.sync"]
        if fact["mma"] != expected:
            yield f"{name}: matrix instructions {fact['mma']}, expected {expected}"
        # Codes that go to an operand in registers are copied in pieces of what a thread needs.
        allowed = {4, 8, 16} if "FORMAT" in fact["constexprs"] else {16}
        if not {16} <= set(fact["copy_bytes"]) <= allowed:
            yield f"{name}: loads of {fact['copy_bytes']} bytes, expected {sorted(allowed)}"
    if fact["bytewise"]:
        yield f"{name}: weights are loaded byte by byte"
    # Activations may be copied in smaller pieces beside the weights.
    if fact["kernel"] in ("gate_up_single", "down_combine") and 16 not in fact["copy_bytes"]:
        yield f"{name}: weights are not loaded 16 bytes at a time"

"""The top-p search compiled without a GPU: no spills, wide loads."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_compiled_search(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = str(HERE.parents[3])
    child = [sys.executable, str(HERE / "nucleus_child.py")]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [fact["arch"] for fact in facts] == [80, 90, 100]
    for fact in facts:
        assert (fact["stack"], fact["local"]) == (0, 0), fact
        assert fact["loads"] == ["4"], fact
        assert fact["reg"] * 32 * fact["warps"] <= 65536, fact  # one block fits a processor

"""What the tests of this folder share: interpreted tests stay out, kernels are compiled in a child.

Triton reads TRITON_INTERPRET when it is first imported, which another test may have caused:
test_interpreted.py runs that folder in a child of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[3]

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


@pytest.fixture
def facts_of(tmp_path):
    """Runs a file that compiles kernels without a GPU; what it prints of them, one JSON a line."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    experts = ROOT / "tests/moesd_kernels/experts/triton"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(experts)])

    def run(name):
        child = [sys.executable, str(HERE / name)]
        done = subprocess.run(child, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run

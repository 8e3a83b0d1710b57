"""Runs ``interpreted/`` in a child where Triton is imported to be interpreted."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.versions import needs_loops_in_the_interpreter

HERE = Path(__file__).parent


@needs_loops_in_the_interpreter
def test_interpreted():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # No device: the interpreter runs on the CPU, and the tests must not depend on the machine.
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0"]
    done = subprocess.run(
        [*command, str(HERE / "interpreted")],
        cwd=HERE.parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

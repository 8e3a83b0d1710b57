"""``import moesd_kernels`` and the folder itself need no Triton, and load no kernel."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import moesd_kernels, moesd_kernels.dense.ops, moesd_kernels.dense.triton
found = [name for name in sys.modules if name.startswith("moesd_kernels.dense.triton.")]
assert not found, found
"""


def test_importing_needs_no_triton():
    root = Path(__file__).resolve().parents[4]
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

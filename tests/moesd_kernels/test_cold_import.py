"""``import moesd_kernels`` needs torch only, and the portable path works without the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import sys
for name in ("triton", "transformers", "safetensors", "ninja", "scipy"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
loaded = set(sys.modules)
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_silent_and_light():
    output = run(
        "import logging, os\n"
        "handlers = list(logging.getLogger().handlers)\n"
        "import moesd_kernels\n"
        "assert logging.getLogger().handlers == handlers\n"
        "assert not torch.cuda.is_initialized()\n"
        "new_modules = set(sys.modules) - loaded\n"
        "new = {name.split('.')[0] for name in new_modules}\n"
        "assert 'moesd_kernels.library' not in sys.modules\n"
        "assert 'torch._dynamo' not in new_modules\n"
        "assert not new & {'decoder', 'bench', 'setuptools'}, new\n"
    )
    assert output == ""


def test_layer_works_without_compiler_or_triton(tmp_path):
    output = run(
        "import moesd_kernels as mk\n"
        "x, up, down = torch.randn(3, 8), torch.randn(2, 8, 8), torch.randn(2, 8, 4)\n"
        "ids, weights = torch.tensor([[0], [1], [1]]), torch.ones(3, 1)\n"
        "from moesd_kernels import library\n"
        "library.built_module = lambda device: None\n"
        "a = mk.fused_experts(x, up, down, ids, weights)\n"
        "b = mk.fused_experts(x, up, down, ids, weights, backend='reference')\n"
        "assert torch.allclose(a, b, atol=1e-5)\n"
        "assert mk.available_backends()['cpu'] is not None\n",
        PATH="/nonexistent",
        CXX="",
        MOESD_CACHE_DIR=str(tmp_path),
    )
    assert "no C++ compiler" in output  # said, on the way to the portable path


def test_register_needs_transformers_and_says_so():
    output = run(
        "import moesd_kernels\n"
        "try:\n"
        "    moesd_kernels.register()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "transformers" in output

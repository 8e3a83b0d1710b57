"""Every test starts from the same seed, on one thread.

Tests marked ``gpu`` need a CUDA device, those marked ``vllm`` vLLM: ``make test-vllm`` runs them.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What imports and collection make lives to the end: the garbage collector is kept from it,
    which otherwise passes over more than half a million objects again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extensions complain of what they find alive at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = pytest.mark.skip(reason="needs vLLM: make test-vllm")
    for item in items:
        for name, skip in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Callable[[int], None]:
    """Says on how many threads a test goes on; the next begins on one again."""
    return torch.set_num_threads


@pytest.fixture
def interpret() -> Callable[[Path], None]:
    """Runs a file or folder of tests in a child where Triton is imported to be interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")

    def run(tests: Path) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        # No device: the interpreter runs on the CPU, and nothing may depend on the machine.
        environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0"]
        done = subprocess.run(
            [*command, str(tests)],
            cwd=Path(__file__).parents[1],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

    return run

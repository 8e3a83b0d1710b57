"""Every result starts poisoned: a value that was never written is seen."""

import pytest
import torch

from moesd_kernels.dense import ops


@pytest.fixture(scope="session", autouse=True)
def cpu_operators():
    """The yardstick, ``torch.ops.moesd`` on the CPU."""
    if reason := ops.unavailable():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    def poison(tensor):
        # A place or number this large lies outside every table.
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**28)

    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: poison(made(*a, **k)))

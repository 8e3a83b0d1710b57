"""Which built module is loaded: this torch's, no older than its sources."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

import moesd_kernels
from moesd_kernels import extension


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_current_module_of_this_torch_is_found(device, tmp_path, monkeypatch):
    monkeypatch.setattr(moesd_kernels, "__path__", [str(tmp_path)])
    assert extension.built_module(device) is None
    built = tmp_path / f"{extension.module_name(device).rpartition('.')[2]}.so"
    built.touch()
    importlib.invalidate_caches()
    assert extension.built_module(device) == built
    os.utime(built, (1, 1))
    assert extension.built_module(device) is None, "older than its sources"
    os.utime(built)
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    assert extension.built_module(device) is None, "built for another torch"

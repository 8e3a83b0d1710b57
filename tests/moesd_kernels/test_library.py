"""Which built module is loaded: this torch's, no older than its sources."""

from __future__ import annotations

import os
import sysconfig

import pytest
import torch

from moesd_kernels import library


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_current_module_of_this_torch_is_found(device, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert library.built_module(device) is None
    name = library.module_name(device).rpartition(".")[2]
    built = tmp_path / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    built.touch()
    assert library.built_module(device) == built
    os.utime(built, (1, 1))
    assert library.built_module(device) is None, "older than its sources"
    os.utime(built)
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    assert library.built_module(device) is None, "built for another torch"

"""The schemas of the C++ and CUDA operators: all in one file, each option of the experts once."""

from __future__ import annotations

import re

import pytest
import torch

from moesd_kernels import library
from moesd_kernels.registered import OPERATORS

REGISTER = library.SOURCE_ROOT / "register.cpp"
SOURCES = [path for path in library.SOURCE_ROOT.rglob("*.c*") if path != REGISTER]


@pytest.fixture(scope="module")
def native():
    """The ops that C++ defines, and the file of each definition."""
    assert library.load("cpu") is None
    found = {}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("moesd::"):
            place = re.search(r"debug: registered at (.*):\d+", torch._C._dispatch_dump(name))
            found[name.removeprefix("moesd::")] = place[1]
    return {name: file for name, file in found.items() if not file.endswith(".py")}


def test_every_schema_is_in_register_cpp(native):
    written = re.findall(r'm\.def\(\s*"(\w+)\(', REGISTER.read_text())
    assert sorted(native) == sorted(written)
    assert all(file.endswith("csrc/register.cpp") for file in native.values()), native


def test_no_schema_is_anywhere_else():
    """CUDA's included, which a torch without CUDA does not load; classes have no schema text."""
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"\bm\.def\(|\bTORCH_LIBRARY\(", text), path
        assert "TORCH_LIBRARY_FRAGMENT" not in text or "m.class_<" in text, path


def test_every_schema_has_a_kernel_and_every_kernel_a_schema(native):
    texts = "".join(path.read_text() for path in SOURCES)
    assert set(re.findall(r'm\.impl\("(\w+)"', texts)) == set(native)


def test_operators_of_a_step_have_kernels_on_a_gpu(native):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    found = {name for name in native if has(f"moesd::{name}", "CUDA")}
    assert found >= set(OPERATORS)


def test_both_ops_of_the_experts_have_the_same_options(native):
    ops = [torch.ops.moesd.experts.default, torch.ops.moesd.try_experts.default]
    experts, tried = (str(op._schema).partition("(")[2].rpartition(") ->")[0] for op in ops)
    assert tried + ", Tensor(a!) out" == experts
    assert REGISTER.read_text().count("gate_up_bias") == 1, "the options are spelled once"


def test_the_activations_named_are_those_taken(native):
    names = torch.ops.moesd.activation_names()
    assert len(set(names)) == len(names) > 0
    x = torch.linspace(-3, 3, 64)
    results = [torch.ops.moesd.act_and_mul(x, x, name) for name in names]
    for i, result in enumerate(results):
        assert not any(torch.equal(result, other) for other in results[:i]), names[i]
    listed = f"activation must be {', '.join(names[:-1])} or {names[-1]}, got tanh"
    with pytest.raises(ValueError, match=listed):
        torch.ops.moesd.act_and_mul(x, x, "tanh")

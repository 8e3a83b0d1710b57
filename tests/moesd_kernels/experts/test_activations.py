"""The names of the activations: Python's table, Triton's list and C++'s are one."""

from __future__ import annotations

import re

import pytest
import torch

from moesd_kernels import library
from moesd_kernels.experts.spec.activations import ALIASES, FUNCTIONS, canonical_activation


def test_aliases_are_names_of_functions():
    assert set(ALIASES.values()) <= set(FUNCTIONS)
    assert not set(ALIASES) & set(FUNCTIONS)
    assert {canonical_activation(name) for name in (*FUNCTIONS, *ALIASES)} == set(FUNCTIONS)


def test_triton_has_the_same_names():
    common = pytest.importorskip("moesd_kernels.experts.triton.common")
    assert set(common.ACTIVATIONS) == set(FUNCTIONS)
    assert sorted(common.ACTIVATIONS.values()) == list(range(len(FUNCTIONS)))


@pytest.mark.skipif(library.load("cpu") is not None, reason=str(library.load("cpu")))
def test_cpp_has_the_same_names():
    assert set(torch.ops.moesd.activation_names()) == set(FUNCTIONS)


@pytest.mark.skipif(library.load("cpu") is not None, reason=str(library.load("cpu")))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_cpp_means_the_same_functions(name):
    x = torch.linspace(-6, 6, 512).view(8, 64)
    actual = torch.ops.moesd.act_and_mul(x, torch.ones_like(x), name)
    torch.testing.assert_close(actual, FUNCTIONS[name](x), rtol=2e-6, atol=1e-6)


@pytest.mark.skipif(library.load("cpu") is not None, reason=str(library.load("cpu")))
@pytest.mark.parametrize("name", [*ALIASES, "mish"])
def test_cpp_says_what_it_knows(name):
    x = torch.ones(1, 4)
    with pytest.raises(ValueError, match=f"got {name}") as error:
        torch.ops.moesd.act_and_mul(x, x, name)
    assert all(re.search(rf"\b{known}\b", str(error.value)) for known in FUNCTIONS)


def test_transformers_calls_the_aliases_by_these_functions():
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-6, 6, 512)
    for alias, name in ALIASES.items():
        torch.testing.assert_close(activations.ACT2FN[alias](x), FUNCTIONS[name](x))

"""What the dispatcher calls on a GPU takes the operators' arguments and gives their results."""

import inspect
from importlib import import_module

import pytest
import torch

from moesd_kernels.registered import OPERATORS, implementation


@pytest.mark.parametrize("name", OPERATORS)
def test_takes_the_operators_arguments(name):
    function = getattr(import_module(f"moesd_kernels.dense.triton.{OPERATORS[name]}"), name)
    schema = getattr(torch.ops.moesd, name).default._schema
    inspect.signature(function).bind(*schema.arguments)


def test_gives_the_operators_results():
    x, w = torch.randint(-3, 4, (2, 3, 40)).float(), torch.randn(40)
    for arguments in ((x, w, 1e-6), (x, w, 1e-6, 1.0, False)):
        expected = torch.ops.moesd.rms_norm(*arguments)
        assert torch.equal(implementation("rms_norm")(*arguments), expected)

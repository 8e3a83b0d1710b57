"""The gated activation: the C++ operator's roundings, eager PyTorch's accuracy."""

import pytest
import torch
from support.oracle import assert_as_accurate

from moesd_kernels.dense import ops
from moesd_kernels.dense.triton import activation_kernel
from moesd_kernels.dense.triton.activation_kernel import act_and_mul
from moesd_kernels.experts.spec.activations import FUNCTIONS

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(activation_kernel, "BLOCK", 32)


def halves(*shape, dtype):
    """Two strided halves of one tensor, as a joined projection leaves them."""
    return (torch.randn(*shape[:-1], 2 * shape[-1]) * 3).to(dtype).chunk(2, -1)


@DTYPES
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_is_as_accurate_as_eager(activation, dtype):
    act = FUNCTIONS[activation]
    gate, up = halves(3, 2, 70, dtype=dtype)
    actual = act_and_mul(gate, up, activation)
    exact = act(gate.double()) * up.double()
    assert_as_accurate(actual, act(gate) * up, exact, name=activation)
    if activation.startswith("relu"):  # no exponential: every step is prescribed
        assert torch.equal(actual, ops.act_and_mul(gate, up, activation))


def test_the_activation_is_rounded_before_the_product():
    gate, up = halves(4, 70, dtype=torch.float16)
    rounded = torch.relu(gate).square() * up
    assert torch.equal(act_and_mul(gate, up, "relu2"), rounded)
    at_once = (torch.relu(gate).float().square() * up.float()).half()
    assert not torch.equal(rounded, at_once)  # the values tell the two apart


def test_a_row_depends_on_itself_alone_wherever_it_lies():
    gate, up = halves(5, 70, dtype=torch.float32)
    whole = act_and_mul(gate, up, "silu")
    for t in range(5):
        row = slice(t, t + 1)
        assert torch.equal(act_and_mul(gate[row].clone(), up[row], "silu")[0], whole[t])
    columns, ups = gate[:, :3].T, up[:, :3].T
    expected = act_and_mul(columns.contiguous(), ups.contiguous(), "silu")
    assert torch.equal(act_and_mul(columns, ups, "silu"), expected)


def test_empty_and_errors():
    gate, up = torch.zeros(3, 8), torch.zeros(5, 8)
    assert act_and_mul(gate[:0], up[:0], "silu").shape == (0, 8)
    with pytest.raises(ValueError, match=r"up must be \[3, 8\], got \[5, 8\]"):
        act_and_mul(gate, up, "silu")
    with pytest.raises(ValueError, match=r"activation must be one of \['gelu'.*got 'tanh'"):
        act_and_mul(gate, gate, "tanh")
    with pytest.raises(TypeError, match=r"gate must be float32, bfloat16 or float16"):
        act_and_mul(gate.int(), gate.int(), "silu")

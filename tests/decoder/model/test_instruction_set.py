"""``MOESD_CPU_ISA`` that names no set of this processor is said so, wherever it is met first."""

import pytest
import torch
from support.tiny import tiny_moe

from decoder.errors import UserError
from decoder.model.kernels import accelerate, ragged_attention_op

TRUE_LINE = "MOESD_CPU_ISA must be one of portable, avx2, got garbage"


@pytest.fixture
def garbage(monkeypatch):
    """As the library answers in a process that was started so."""
    ops = pytest.importorskip("moesd_kernels.dense.ops")
    if ops.unavailable() is not None:
        pytest.skip(f"no C++ operators: {ops.unavailable()}")

    def isa():
        raise RuntimeError(f"{TRUE_LINE}\nException raised from choose")

    monkeypatch.setenv("MOESD_CPU_ISA", "garbage")
    monkeypatch.setattr(ops, "isa", isa)


def test_it_is_refused_rather_than_worked_around(garbage):
    with pytest.raises(UserError, match=f"^{TRUE_LINE}"):
        accelerate(tiny_moe())
    with pytest.raises(UserError, match=f"^{TRUE_LINE}"):
        ragged_attention_op(torch.device("cpu"), torch.float32)
    assert ragged_attention_op(torch.device("cpu"), torch.float32, "portable") is None

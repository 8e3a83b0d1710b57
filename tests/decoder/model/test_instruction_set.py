"""``MOESD_CPU_ISA`` that names no set of this processor is said so, wherever it is met first."""

import pytest
from support.tiny import tiny_moe

from decoder.errors import UserError
from decoder.model import kernels


def test_it_is_refused_rather_than_worked_around(monkeypatch):
    def unknown():
        raise RuntimeError("MOESD_CPU_ISA must be one of avx2, got garbage\nraised from choose")

    ops = type("Ops", (), {"cpu_isa": staticmethod(unknown)})
    monkeypatch.setattr(kernels, "_cpu_ops", lambda device, dtype: ops)
    with pytest.raises(UserError, match=r"^MOESD_CPU_ISA must be one of avx2, got garbage$"):
        kernels.accelerate(tiny_moe())

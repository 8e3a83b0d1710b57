"""Fixtures for the ``conftest.py`` of folders whose tests run interpreted kernels."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and workspaces start poisoned: a value that was never written is seen."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        # A place or number this large lies outside every table.
        return tensor.fill_(
            1 if tensor.dtype == torch.bool else min(2**28, torch.iinfo(tensor.dtype).max)
        )

    for name in ("empty", "empty_like"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: poison(made(*a, **k)))


@pytest.fixture(autouse=True)
def patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton makes its language the interpreter's again at every call of a function in a kernel,
    which takes most of a small kernel's time; where it already is, nothing is left to do."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return

    def once(function: FunctionType) -> Any:
        seen = function.__globals__.values()
        used = [lang for lang in (tl, tl.core) if any(value is lang for value in seen)]
        if any(tl.core.is_builtin(lang.load) for lang in used):
            return patch(function)
        return None  # what a launch would restore; calls within one do not

    monkeypatch.setattr(interpreter, "_patch_lang", once)


@pytest.fixture(autouse=True)
def nothing_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the interpreter's time goes to what has no effect: sums and products of integers
    are taken again in 64 bits for an assertion that without ``debug`` is dropped, and a table of
    NumPy's types is made anew for every number."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    assert not interpreter.InterpreterOptions().debug
    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None)
    found, known = interpreter._get_np_dtype, dict[str, np.dtype]()

    def np_dtype(of: Any) -> np.dtype:
        if of.name not in known:
            known[of.name] = found(of)
        return known[of.name]

    monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype)


@pytest.fixture(autouse=True)
def exact_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's bf16, which are bits to it, become fp32 and back as on hardware: what it
    does by itself loses subnormals and rounds ties up."""
    import triton.language as tl
    from triton.runtime import interpreter

    others = interpreter._convert_float

    def convert(numbers: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return numbers.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).bfloat16()
            return rounded.view(torch.uint16).numpy()
        return others(numbers, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture
def matrix_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that round a row the same way wherever it lies in its tile."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        a, b = a.astype(dtype), b.astype(dtype)
        total = np.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            total += a[:, k : k + 1] * b[k]
        return total

    monkeypatch.setattr(np, "matmul", matmul)

"""Every failure on something that was given becomes one printable line; interrupts stay."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError

from decoder.errors import UserError, explained, one_line

PanicException = type("PanicException", (BaseException,), {})
FAILURES = {
    "file": (FileNotFoundError(2, "No such file", "a/b"), "No such file: a/b"),
    "lookup": (KeyError("rope_type"), "KeyError: 'rope_type'"),
    "empty": (AssertionError(), "AssertionError"),
    "division": (ZeroDivisionError("division by zero"), "division by zero"),
    "many lines": (ValueError("Wrong field:\n    TypeError: x\n"), "Wrong field: TypeError"),
    "json": (json.JSONDecodeError("Expecting value", "", 0), "Expecting value"),
    "memory": (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
    "depth": (RecursionError("maximum recursion depth exceeded"), "maximum recursion depth"),
    "text": (
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        "'utf-8' codec can't decode",
    ),
    "header": (SafetensorError("HeaderTooLarge"), "HeaderTooLarge"),
    "no class of Python's": (Exception("data did not match"), "data did not match"),
    "a panic in Rust": (PanicException("index out of bounds"), "index out of bounds"),
}


@pytest.mark.parametrize(("failure", "said"), FAILURES.values(), ids=FAILURES)
def test_a_failure_becomes_one_line_with_its_cause(failure, said):
    with pytest.raises(UserError) as caught, explained("cannot read 'x'"):
        raise failure
    assert str(caught.value).startswith(f"cannot read 'x': {said}")
    assert str(caught.value).isprintable()
    assert caught.value.__cause__ is failure


@pytest.mark.parametrize("passing", [UserError("as it is"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_failure_to_explain_passes(passing):
    with pytest.raises(type(passing)) as caught, explained("cannot read 'x'"):
        raise passing
    assert caught.value is passing


def test_a_reason_has_an_end():
    with pytest.raises(UserError) as caught, explained("cannot read 'x'"):
        raise RuntimeError("size mismatch " * 10_000)
    assert len(str(caught.value)) < 600


def test_nothing_that_a_terminal_obeys_or_cannot_print_is_left():
    assert one_line("a\x1b[2J\n b\ud800\t c") == r"a\x1b[2J b\ud800 c"

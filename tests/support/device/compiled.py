"""What may be wrong with any kernel that was compiled without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def title(fact: dict[str, Any]) -> str:
    """The kernel that a fact is of."""
    return f"sm_{fact['arch']} {fact['kernel']} {fact['case']}"


def code_problems(fact: dict[str, Any], early: Sequence[str] = ()) -> Iterator[str]:
    """What is wrong with one of ``compile_child.code_facts``, in words.

    Args:
        fact: of a kernel.
        early: what it may do to memory before it waits for the launch that it depends on.
    """
    name = title(fact)
    if fact["stack"] or fact["local"]:
        yield f"{name}: spills {fact['stack']} + {fact['local']} bytes"
    if fact["reg"] * fact["threads"] > 65536:
        yield f"{name}: {fact['reg']} registers of {fact['threads']} threads fit no multiprocessor"
    if fact["dependent_launch"] != (fact["arch"] >= 90):
        yield f"{name}: programmatic dependent launch is {fact['dependent_launch']}"
    if fact["arch"] >= 90 and fact["early"] != list(early):
        yield f"{name}: {fact['early']} before the dependency wait, expected {list(early)}"

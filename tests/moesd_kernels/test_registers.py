"""What the compiler makes of the innermost loops: their sums stay in registers."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from moesd_kernels import library
from moesd_kernels.dense import ops

pytestmark = [
    pytest.mark.skipif(ops.unavailable() is not None, reason=str(ops.unavailable())),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not here"),
]

_FUNCTION = re.compile(r"^[0-9a-f]+ <(?:\w+ )*moesd::(\w+)::(.*)>:$")
_WIDE = ("avx2", "avx512", "avx512_bf16", "amx")
_WEIGHT_ROWS = 4  # of a tile


@functools.cache
def functions() -> dict[str, list[str]]:
    """Of the library that is loaded: instruction set and name -> instructions."""
    path = library.built_module("cpu") or library.compiled_library("cpu")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(path)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    body: list[str] = []
    for line in listed.splitlines():
        if line.endswith(">:"):
            body = []
            if match := _FUNCTION.match(line):
                body = found.setdefault(f"{match[1]} {match[2]}", [])
        else:
            body.append(line.partition("\t")[2])
    return found


def named(pattern: str) -> Iterator[tuple[str, re.Match[str], list[str]]]:
    """Functions for wide vectors that match, the match first of all instruction sets'."""
    for name, body in functions().items():
        match = re.match(rf"({'|'.join(_WIDE)}) {pattern}", name)
        if match:
            yield name, match, body


def spills(body: list[str]) -> int:
    """Instructions that move vectors to the stack or read them there."""
    return sum("(%rsp)" in line and re.search(r"[yz]mm", line) is not None for line in body)


def test_tiles_keep_their_sums_in_registers() -> None:
    """Sums that lie in memory are read and written in both halves of a step: six times each."""
    tiles = list(named(r"dot_tile<[\w:]+, (\d)>"))
    assert {match[1] for _, match, _ in tiles} >= set(_WIDE) - {"amx"}
    for name, match, body in tiles:
        assert spills(body) <= 3 * _WEIGHT_ROWS * int(match[2]), name
        assert not any(line.startswith("call") for line in body), name


def test_tiles_of_integers_spill_next_to_nothing() -> None:
    tiles = list(named(r"VnniRowProduct::multiply<(\d)")) + list(named(r"VnniProduct::add_rows<"))
    assert len(tiles) > 6
    for name, _, body in tiles:
        assert spills(body) <= 4, name


def test_weights_are_decoded_beside_sums_without_calls() -> None:
    """Around a call all vectors would be spilled, however rarely it is made."""
    tiles = list(named(r"(?:auto )?fused_tile<[\w:]+, [\w:]+, \d, \w+>"))
    assert len(tiles) > 8 * 4
    for name, _, body in tiles:
        assert not any(line.startswith("call") for line in body), name

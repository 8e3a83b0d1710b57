"""csrc as a house: which room sees which, and nothing too long to read."""

from __future__ import annotations

import re

import pytest

from moesd_kernels.library import SOURCE_ROOT

FILES = sorted(path for path in SOURCE_ROOT.rglob("*") if path.is_file())
NAMES = [str(path.relative_to(SOURCE_ROOT)) for path in FILES]
ROOMS = ("formats", "int8", "int8/vnni", "recurrent", "sampling")
KERNEL_ROOMS = tuple(f"cpu/kernels/{room}" for room in ROOMS)
# What each room may include besides itself: kernels reach the ops through types.h's KernelTable.
MAY_INCLUDE = {
    ".": set(),
    "cpu": set(),
    "cpu/kernels": {"cpu", "cpu/kernels/formats"},
    "cpu/kernels/formats": {"cpu", "cpu/kernels"},
    "cpu/kernels/int8": {"cpu", "cpu/kernels", "cpu/kernels/formats"},
    "cpu/kernels/int8/vnni": {"cpu", "cpu/kernels", "cpu/kernels/formats", "cpu/kernels/int8"},
    "cpu/kernels/recurrent": {"cpu", "cpu/kernels"},
    "cpu/kernels/sampling": {"cpu", "cpu/kernels"},
    "cpu/isa": {"cpu", "cpu/kernels", *KERNEL_ROOMS, "cpu/isa/amx"},
    "cpu/isa/amx": {"cpu", "cpu/kernels", *KERNEL_ROOMS},
    "cpu/ops": {"cpu", "."},
    "cuda": {"."},
}
TYPES = re.compile(r"(template .*> )?(namespace|struct|class|enum|union|extern)\b")


def room(path):
    return str(path.relative_to(SOURCE_ROOT).parent)


def included(path):
    """The files of ours that a file includes."""
    names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    return [(path.parent / name).resolve() for name in names]


def blocks(text):
    """(first line, last line) of every braced block but types', its signature included."""
    open_blocks, start = [], 1
    for number, line in enumerate(text.splitlines(), 1):
        code = re.sub(r"\"(\\.|[^\"\\])*\"|'(\\.|[^'\\])'|//.*", "", line).rstrip()
        header = " ".join(text.splitlines()[start - 1 : number]).strip()
        for brace in re.findall(r"[{}]", code):
            if brace == "{":
                open_blocks.append((start, TYPES.match(header) is not None))
            else:
                first, is_type = open_blocks.pop()
                if not is_type:
                    yield first, number
        if not code or code[0] == "#" or code[-1] in ";{}" or code.endswith((":", "*/")):
            start = number + 1


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_sees_its_room_and_what_that_may_see(path):
    for other in included(path):
        assert other in FILES
        assert room(other) in {room(path), *MAY_INCLUDE[room(path)]}, other


def test_headers_include_each_other_in_no_circle():
    left = {path: set(included(path)) for path in FILES}
    while free := [path for path, others in left.items() if not others & left.keys()]:
        for path in free:
            del left[path]
    assert not left


def test_what_is_compiled_for_an_instruction_set_sees_nothing_of_torch():
    for path in FILES:
        if room(path) not in (".", "cpu/ops", "cuda"):
            assert not re.search(r"#include <(ATen|torch|c10)", path.read_text()), path


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_is_too_long(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 300
    assert [line for line in lines if len(line) > 100] == []
    assert [span for span in blocks(path.read_text()) if span[1] - span[0] >= 60] == []


def test_blocks_are_found():
    text = "struct A {\n    int\n    f(int x) {\n        if (x) {\n            g('}');\n        }\n"
    assert sorted(blocks(text + "    }\n};\n")) == [(2, 7), (4, 6)]

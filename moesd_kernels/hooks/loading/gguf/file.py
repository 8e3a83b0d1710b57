"""A GGUF file: its metadata and its tensors, each where the file says, once that is checked.

Nothing in a file is believed: every length is held against the bytes that are there before memory
is taken for it, and every tensor's place against the others'.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS

from .cursor import Cursor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"
_NUMBERS = {0: ("f32", torch.float32), 1: ("f16", torch.float16), 30: ("bf16", torch.bfloat16)}
_BLOCKS = {
    **{2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0"},
    **{12: "q4_k", 13: "q5_k", 14: "q6_k"},
}
_NOT_READ = {
    **{9: "q8_1", 10: "q2_k", 11: "q3_k", 15: "q8_k"},
    **{16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s"},
    **{22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64"},
    **{29: "iq1_m", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4"},
}
_READ = ", ".join([*(name for name, _ in _NUMBERS.values()), *_BLOCKS.values()])


class StoredTensor(NamedTuple):
    """A tensor's place in a file.

    Attributes:
        name: llama.cpp's.
        kind: how it is stored: ``f32``, ``f16``, ``bf16``, or a name in ``WEIGHT_FORMATS``.
        dtype: of its numbers; of the bytes of its blocks.
        shape: outermost first, as torch has it.
        width: numbers, or bytes of blocks, in a row.
        start: in bytes from the file's start.
        size: in bytes.
    """

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    width: int
    start: int
    size: int

    @property
    def packed(self) -> bool:
        """Whether it is stored in blocks."""
        return self.kind in WEIGHT_FORMATS


class GgufFile:
    """A file's header, read and checked; its tensors stay on disk until they are asked for.

    Attributes:
        path: of the file.
        fields: metadata: numbers, texts, and lists of them.
        tensors: by name.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the header.

        Raises:
            OSError: no such file, or one that may not be read.
            ValueError: no GGUF file, a part of one, one that is cut off, one that contradicts
                itself, or a type of tensors that is not read; the path and what it is.
        """
        self.path = Path(path)
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        if not self.path.is_file():
            self.path.stat()  # which says why it is not there
            raise ValueError(f"{self.path} is no file")
        try:
            if not self.path.stat().st_size:
                raise ValueError("it is empty")
            data: Any = np.memmap(self.path, np.uint8, mode="r")
            self._data = data
            self._read(Cursor(memoryview(data)))
        except ValueError as error:
            raise ValueError(f"{self.path} cannot be read as GGUF: {error}") from error

    def field(self, name: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata.

        Args:
            name: of the field.
            kind: int, float, bool, str or list.
            default: where there is none; without, there must be one.

        Raises:
            ValueError: there is none, or one of another kind.
        """
        value = self.fields.get(name, default)
        if value is None:
            raise ValueError(f"{self.path} has no {name}")
        if type(value) is not kind:
            got = type(value).__name__
            raise ValueError(f"{self.path}: {name} must be {kind.__name__}, got {got}")
        return value

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor: its numbers, or the blocks of its rows, ``[..., R, bytes]``."""
        stored = self.tensors[name]
        data = self._data[stored.start : stored.start + stored.size]
        return torch.tensor(data).view(stored.dtype).view(*stored.shape[:-1], stored.width)

    def values(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor's numbers ``[..., R, C]``, its blocks unpacked."""
        tensor, stored = self.tensor(name), self.tensors[name]
        if stored.packed:
            tensor = WEIGHT_FORMATS[stored.kind].decode(tensor, None)
        return tensor.to(dtype)

    def _read(self, cursor: Cursor) -> None:
        tensors, fields = _read_start(cursor, self._data[:4].tobytes())
        for _ in range(fields):
            cursor.what = "its metadata"
            name = _named(cursor, self.fields)
            kind, cursor.what = cursor.number("I"), f"its metadata {name}"
            self.fields[name] = cursor.value(kind)
        if self.fields.get("split.count", 0) not in (0, 1):  # one part is the whole
            raise ValueError(
                f"it is one of {self.fields['split.count']} parts, expected a whole file: "
                "`llama-gguf-split --merge` makes one of them"
            )
        cursor.what = "its list of tensors"
        for _ in range(tensors):
            stored = _tensor_info(cursor, self.tensors)
            self.tensors[stored.name] = stored
        align = self.fields.get(_ALIGNMENT, 32)
        if type(align) is not int or align < 8 or align & (align - 1):
            raise ValueError(f"{_ALIGNMENT} must be a power of two from 8 on, got {align!r}")
        base = -(-cursor.place // align) * align
        for name, stored in self.tensors.items():
            if stored.start % align:
                raise ValueError(f"{name} must start at a multiple of {align}, got {stored.start}")
            self.tensors[name] = stored._replace(start=base + stored.start)
        _check_places(self.tensors, self._data.size)


def _read_start(cursor: Cursor, start: bytes) -> tuple[int, int]:
    """The counts of tensors and fields."""
    if start != _MAGIC:
        raise ValueError(f"it must start with {_MAGIC!r}, got {start!r}")
    cursor.number("I")
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = version & 0xFFFF == 0
        got = "one of a big-endian machine" if swapped else str(version)
        raise ValueError(f"its version must be {' or '.join(map(str, _VERSIONS))}, got {got}")
    return cursor.number("Q"), cursor.number("Q")


def _named(cursor: Cursor, known: dict[str, Any]) -> str:
    name = cursor.text()
    if not name:
        raise ValueError(f"{cursor.what} has no name")
    if name in known:
        raise ValueError(f"{cursor.what} has {name!r} twice")
    return name


def _tensor_info(cursor: Cursor, known: dict[str, Any]) -> StoredTensor:
    name = _named(cursor, known)
    count = cursor.number("I")
    if not 1 <= count <= _DIMENSIONS:
        raise ValueError(f"{name} must have 1 to {_DIMENSIONS} dimensions, got {count}")
    shape = tuple(cursor.number("Q") for _ in range(count))[::-1]
    kind, start = cursor.number("I"), cursor.number("Q")
    if 0 in shape:
        raise ValueError(f"{name} must have values, got the shape {shape}")
    if kind in _NUMBERS:
        stored, dtype = _NUMBERS[kind]
        width = shape[-1]
    elif kind in _BLOCKS:
        stored, dtype = _BLOCKS[kind], torch.uint8
        known_format = WEIGHT_FORMATS[stored]
        if shape[-1] % known_format.block:
            raise ValueError(
                f"{name} has rows of {shape[-1]} weights, expected a multiple of "
                f"{known_format.block} in {stored}"
            )
        width = known_format.width(shape[-1])
    else:
        got = _NOT_READ.get(kind, f"of the unknown type {kind}")
        raise ValueError(f"{name} is {got}, read are {_READ}")
    size = math.prod(shape[:-1]) * width * dtype.itemsize
    return StoredTensor(name, stored, dtype, shape, width, start, size)


def _check_places(tensors: dict[str, StoredTensor], size: int) -> None:
    """Refuse tensors that reach beyond the file or into each other."""
    end, before = 0, ""
    for stored in sorted(tensors.values(), key=lambda stored: stored.start):
        if stored.start < end:
            raise ValueError(f"{stored.name} must start after {before} ends, at {end}")
        end, before = stored.start + stored.size, stored.name
        if end > size:
            raise ValueError(f"it ends within {stored.name}: {end} bytes wanted, {size} there")

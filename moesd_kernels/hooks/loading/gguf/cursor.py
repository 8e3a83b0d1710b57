"""A GGUF header's values, one after the other, none of which is believed to fit into its file."""

from __future__ import annotations

import struct
from array import array
from typing import Any

_LONGEST = 2**24  # bytes of a text; the longest that files hold are chat templates
_MOST = 2**22  # items of an array; the longest are vocabularies
_STRING, _ARRAY, _BOOL = 8, 9, 7
# A type's id, and its value in the words of ``struct`` and ``array``.
_NUMBERS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f"},
    **{7: "B", 10: "Q", 11: "q", 12: "d"},
}


class Cursor:
    """Where a header has been read up to.

    Attributes:
        place: in bytes from the file's start.
        what: is read at present, for messages.
    """

    def __init__(self, data: memoryview) -> None:
        """Start at the beginning of a file's bytes."""
        self._data = data
        self.place, self.what = 0, "its header"

    @property
    def left(self) -> int:
        """Bytes up to the file's end."""
        return len(self._data) - self.place

    def number(self, code: str) -> Any:
        """A number, in a word of ``struct``."""
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        """A text behind its length."""
        length = self.number("Q")
        if length > _LONGEST:
            raise ValueError(f"{self.what} has a text of {length} bytes, read are {_LONGEST}")
        return self._take(length).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value of a type: a number, a text, or a list of either."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._list()
        if kind not in _NUMBERS:
            raise ValueError(f"{self.what} has a value of the unknown type {kind}")
        number = self.number(_NUMBERS[kind])
        return bool(number) if kind == _BOOL else number

    def _list(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if kind != _STRING and kind not in _NUMBERS:
            raise ValueError(f"{self.what} is a list of values of the unknown type {kind}")
        if count > _MOST:
            raise ValueError(f"{self.what} is a list of {count} values, read are {_MOST}")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        numbers = array(_NUMBERS[kind])
        numbers.frombytes(self._take(count * numbers.itemsize))
        return [bool(number) for number in numbers] if kind == _BOOL else numbers.tolist()

    def _take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"it ends within {self.what}: {count} bytes wanted, {self.left} there")
        taken = bytes(self._data[self.place : self.place + count])
        self.place += count
        return taken

"""Reading parts of files without leaving them in the page cache.

An expert is kept by the store or not at all: a copy in the page cache would take the memory that
the budget is to spare. Reads are plain ones into their final place, of exactly the pages asked for
(no read-ahead), after each of which the kernel is told to drop its copy. Direct I/O would spare
that copy, but wants offsets, sizes and addresses in whole blocks, which tensors in safetensors
files do not have, and a file system that supports it.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from decoder.errors import UserError, explained

_Identity = tuple[int, int, int]


class Extent(NamedTuple):
    """Bytes that lie together in a file.

    Attributes:
        file: which.
        offset: of the first byte.
        size: how many.
    """

    file: Path
    offset: int
    size: int

    def nth(self, index: int, count: int) -> Extent:
        """One of ``count`` equal parts."""
        size = self.size // count
        return Extent(self.file, self.offset + index * size, size)


def tensor_extents(files: Iterable[Path]) -> dict[str, Extent]:
    """Name to bytes of every tensor; the files' headers have been checked by ``tensor_headers``."""
    extents = {}
    for file in files:
        with explained(f"cannot read {file} as safetensors"), file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
            for name, fields in header.items():
                if name != "__metadata__":
                    first, end = fields["data_offsets"]
                    extents[name] = Extent(file, 8 + length + first, end - first)
    return extents


class OpenFiles:
    """Files that stay open, so that what becomes of their names changes nothing.

    Args:
        files: to be read from.

    Raises:
        UserError: one cannot be opened.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._opened: dict[Path, tuple[int, _Identity]] = {}
        for file in sorted(set(files)):
            with explained(f"cannot open {file}"):
                descriptor = os.open(file, os.O_RDONLY)
                self._opened[file] = descriptor, _identity(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read_all(self, extents: Iterable[Extent], into: memoryview) -> None:
        """``read`` of several, one after the other."""
        for extent in extents:
            self.read(extent, into[: extent.size])
            into = into[extent.size :]

    def read(self, extent: Extent, into: memoryview) -> None:
        """Fill ``into`` with the bytes of ``extent``.

        Raises:
            UserError: the file has been changed since it was opened, ends early, or cannot be read.
        """
        descriptor, identity = self._opened[extent.file]
        with explained(f"cannot read {extent.file}"):
            if _identity(descriptor) != identity:
                raise UserError(f"{extent.file} has changed since the model was loaded from it")
            done = 0
            while done < extent.size:
                count = os.preadv(descriptor, [into[done:]], extent.offset + done)
                if count == 0:
                    raise UserError(f"{extent.file} ends before byte {extent.offset + extent.size}")
                done += count
            start = extent.offset // mmap.PAGESIZE * mmap.PAGESIZE  # dropped by whole pages
            end = -(-(extent.offset + extent.size) // mmap.PAGESIZE) * mmap.PAGESIZE
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)

    def forget(self) -> None:
        """Have the page cache drop everything of the files that nobody has mapped."""
        for descriptor, _ in self._opened.values():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close them; nothing can be read after it."""
        while self._opened:
            os.close(self._opened.popitem()[1][0])


def _identity(descriptor: int) -> _Identity:
    """What changes when somebody writes to the file."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ino

"""A tensor of all experts of a layer that takes memory for those alone which have been read.

It is address space, mapped and empty; a page takes memory when it is written, and gives it back
when its expert is dropped. So an expert lies where it would lie if the whole layer were loaded, and
whatever computes with the layer needs to know nothing.
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

from decoder.errors import UserError


class ExpertMemory:
    """Address space for one projection of a layer's experts.

    Args:
        shape: ``[E, ...]``.
        dtype: of its numbers.

    Attributes:
        tensor: all of it, ``shape``; what is not read is zero.

    Raises:
        UserError: this system cannot give memory back by page.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if sys.platform != "linux":
            raise UserError(f"experts can be offloaded on Linux, got {sys.platform}")
        elements = torch.Size(shape).numel()
        self._size = elements * dtype.itemsize // shape[0]  # bytes of an expert
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, elements * dtype.itemsize, flags=private)
        # Pages of 2 MB would hold parts of neighbours, and the budget counts what is used.
        with suppress(OSError):  # a kernel that knows none
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.tensor: Tensor = torch.frombuffer(self._map, dtype=dtype).view(shape)

    def place(self, expert: int) -> memoryview:
        """The bytes of an expert, to be written."""
        return memoryview(self._map)[expert * self._size : (expert + 1) * self._size]

    def drop(self, expert: int) -> None:
        """Give back the pages that hold nothing but this expert."""
        page = mmap.PAGESIZE
        first = -(-expert * self._size // page) * page
        end = (expert + 1) * self._size // page * page
        if end > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

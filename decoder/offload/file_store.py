"""Experts that are read from their files into the memory of a CPU."""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor

from .files import Extent, OpenFiles
from .layout import Layout, files_of
from .memory import ExpertMemory
from .residency import Key
from .store import ExpertStore

_READERS = 4  # reads in flight: a disk is faster with a few


class FileStore(ExpertStore):
    """Experts on files; those that have been read lie at their ids.

    Args:
        layout, budget, prefetch: see ``ExpertStore``.

    Raises:
        UserError: a budget below one layer's experts, or a system without what is needed.
    """

    def __init__(self, layout: Layout, budget: int, prefetch: bool = True) -> None:
        super().__init__(layout, budget, prefetch)
        self._memories = [[ExpertMemory(p.shape, p.dtype) for p in own] for own in self._layers]
        self.weights = [
            {p.name: memory.tensor for p, memory in zip(own, memories, strict=True)}
            for own, memories in zip(self._layers, self._memories, strict=True)
        ]
        self._files = OpenFiles(files_of(layout))
        self._readers = ThreadPoolExecutor(_READERS, "expert-reader")
        self._reading: dict[Key, Future[None]] = {}
        weakref.finalize(self, _close, self._readers, self._files)

    def leave_page_cache(self) -> None:
        """Have the kernel drop all that it holds of the files, as far as nobody maps it."""
        self._files.forget()

    def _start(self, key: Key) -> None:
        layer, expert = key
        parts = [
            (projection.experts[expert], memory.place(expert))
            for projection, memory in zip(self._layers[layer], self._memories[layer], strict=True)
        ]
        self._reading[key] = self._readers.submit(_read, self._files, parts)

    def _settle(self) -> list[BaseException]:
        """See ``ExpertStore``.

        A read is taken off the list when it is over, so that an interrupt leaves it to the next
        run.
        """
        failures = []
        for key, reading in list(self._reading.items()):
            error = reading.exception()
            del self._reading[key]
            if error is None:
                self._residency.admit(key)
            else:
                failures.append(error)
        return failures

    def _drop(self, key: Key) -> None:
        for memory in self._memories[key[0]]:
            memory.drop(key[1])


def _read(files: OpenFiles, parts: list[tuple[tuple[Extent, ...], memoryview]]) -> None:
    """Not of the store's: one that is given up would end in the thread that it has to wait for."""
    for extents, into in parts:
        files.read_all(extents, into)


def _close(readers: ThreadPoolExecutor, files: OpenFiles) -> None:
    readers.shutdown(cancel_futures=True)
    files.close()

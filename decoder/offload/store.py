"""Brings the experts that a layer needs into memory, and keeps as many as fit.

Each distinct expert is read once per forward, however many tokens were sent to it: the more tokens
a step verifies, the less a token pays for. While a layer computes, those that the next layer used
in the step before are read, at most a quarter of the places of them, as long as such hints come
true: reading does not change what is computed, only when it can be.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from torch import Tensor

from decoder.errors import UserError

from .files import OpenFiles
from .layout import Layout, Projection
from .memory import ExpertMemory
from .residency import Key, Residency
from .stats import OffloadStats

_READERS = 4  # reads in flight: a disk is faster with a few
_AHEAD = 4  # prefetching may use one of so many places
_WORTH = 0.9  # share of hints that must come true
_MEMORY = 1 / 8  # weight of a layer's last run in what is known of hints


class ExpertStore:
    """The routed experts of one model, on files and partly in memory.

    Args:
        layout: where they lie.
        budget: bytes of memory for them.
        prefetch: read on hints.

    Attributes:
        weights: by layer, the parameter's name and the tensor of all experts, which is defined
            where ``resident`` has made it so.
        stats: counts since ``begin``.

    Raises:
        UserError: a budget below one layer's experts, or a system without what is needed.
    """

    def __init__(self, layout: Layout, budget: int, prefetch: bool = True) -> None:
        self._layers = list(layout.values())
        self.expert_bytes = max(map(_expert_bytes, self._layers))
        most = max(map(_count, self._layers))
        everything = sum(map(_count, self._layers))
        if budget < most * self.expert_bytes:
            raise UserError(
                f"the budget for experts must be at least {_gigabytes(most * self.expert_bytes)}, "
                f"one layer's {most} of {_gigabytes(self.expert_bytes)}, got {_gigabytes(budget)}"
            )
        places = min(budget // self.expert_bytes, everything)
        self._prefetches = prefetch
        self._residency = Residency(len(self._layers), places)
        self._memories = [
            [ExpertMemory(p.shape, p.dtype) for p in projections] for projections in self._layers
        ]
        self.weights = [
            {p.name: memory.tensor for p, memory in zip(own, memories, strict=True)}
            for own, memories in zip(self._layers, self._memories, strict=True)
        ]
        extents = (x for own in self._layers for p in own for e in p.experts for x in e)
        self._files = OpenFiles(extent.file for extent in extents)
        self._readers = ThreadPoolExecutor(_READERS, "expert-reader")
        self._reading: dict[Key, Future[None]] = {}
        self._ahead: set[Key] = set()  # read on a hint, and not asked for yet
        self._trust = 0.0  # share of hints that came true
        self._lock = threading.RLock()
        self.stats = OffloadStats()
        weakref.finalize(self, _close, self._readers, self._files)

    @property
    def places(self) -> int:
        """Most experts in memory."""
        return self._residency.places

    def begin(self) -> OffloadStats:
        """Count from here, in what is returned."""
        self.stats = OffloadStats()
        return self.stats

    def leave_page_cache(self) -> None:
        """Have the kernel drop all that it holds of the files, as far as nobody maps it."""
        self._files.forget()

    @contextmanager
    def resident(self, layer: int, ids: Tensor) -> Iterator[None]:
        """A block in which the experts of a layer that tokens were sent to are in memory.

        Args:
            layer: which of the layers with experts.
            ids: int64 of experts, of any shape; those outside the layer stand for none.

        Raises:
            UserError: one cannot be read.
        """
        with self._lock:
            self._bring(layer, self._tokens_by_expert(layer, ids))
            if self._prefetches and self._trust >= _WORTH:
                self._prefetch(layer)
            yield

    def _tokens_by_expert(self, layer: int, ids: Tensor) -> dict[int, int]:
        experts = range(_count(self._layers[layer]))
        counts = sorted(Counter(ids.flatten().tolist()).items())
        return {expert: count for expert, count in counts if expert in experts}

    def _bring(self, layer: int, tokens: Mapping[int, int]) -> None:
        """Have the experts with tokens in memory; the layer runs."""
        residency, stats = self._residency, self.stats
        start = time.perf_counter()
        self._settle()  # what failed there is asked for again, or not needed
        hinted = residency.last_run(layer).keys()
        if hinted:
            came_true = len(hinted & tokens.keys()) / len(hinted)
            self._trust += _MEMORY * (came_true - self._trust)
        wanted = {(layer, expert) for expert in tokens}
        stats.useful += len(wanted & self._ahead)
        self._ahead = {key for key in self._ahead if key[0] != layer}
        residency.note_run(layer, tokens)
        missing = [key for key in sorted(wanted) if key not in residency]
        stats.needed += len(wanted)
        stats.missed += len(missing)
        self._read(layer, missing, wanted)
        failures = self._settle()
        stats.wait += time.perf_counter() - start
        if failures:
            raise failures[0]

    def _prefetch(self, layer: int) -> None:
        """Start to read what the next layer's last run used, most tokens first."""
        residency = self._residency
        following = (layer + 1) % residency.layers
        tokens = residency.last_run(following)
        hinted = {(following, expert) for expert in tokens}
        missing = sorted(
            (key for key in hinted if key not in residency), key=lambda key: -tokens[key[1]]
        )
        running = {(layer, expert) for expert in residency.last_run(layer)}
        keep = hinted | running
        room = min(residency.places // _AHEAD, residency.places - len(running))
        chosen = sorted(missing[:room])
        read = self._read(following, chosen, keep)
        self.stats.prefetched += read
        self._ahead |= set(chosen[:read])

    def _read(self, layer: int, missing: list[Key], keep: set[Key]) -> int:
        """Start to read experts of a layer in place of others; returns how many have one."""
        residency = self._residency
        for key in residency.victims(layer, len(missing) - residency.free, keep):
            residency.forget(key)
            for memory in self._memories[key[0]]:
                memory.drop(key[1])
        started = missing[: residency.free]
        for key in started:
            self._reading[key] = self._readers.submit(self._read_expert, *key)
        self.stats.bytes_read += len(started) * self.expert_bytes
        return len(started)

    def _read_expert(self, layer: int, expert: int) -> None:
        for projection, memory in zip(self._layers[layer], self._memories[layer], strict=True):
            place = memory.place(expert)
            for extent in projection.experts[expert]:
                self._files.read(extent, place[: extent.size])
                place = place[extent.size :]

    def _settle(self) -> list[BaseException]:
        """Wait for every read that was started; returns what went wrong.

        One is taken off the list when it is over, so that an interrupt leaves it to the next run.
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


def _close(readers: ThreadPoolExecutor, files: OpenFiles) -> None:
    readers.shutdown()
    files.close()


def _count(projections: list[Projection]) -> int:
    """Experts of a layer."""
    return projections[0].shape[0]


def _expert_bytes(projections: list[Projection]) -> int:
    return sum(projection.expert_bytes for projection in projections)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"

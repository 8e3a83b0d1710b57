"""Brings the experts that a layer needs to where it computes, and keeps as many as fit.

Each distinct expert is brought once per forward, however many tokens were sent to it: the more
tokens a step verifies, the less a token pays for. While a layer computes, those that the next layer
used in the step before are brought, at most a quarter of the places of them, as long as such hints
come true: that does not change what is computed, only when it can be.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from .layout import Layout, Projection
from .policy import WORTH, places_within, room_ahead
from .residency import Key, Residency
from .stats import OffloadStats

_MEMORY = 1 / 8  # weight of a layer's last run in what is known of hints


class ExpertStore(ABC):
    """The routed experts of one model, some of them where they are computed.

    Args:
        layout: where they lie.
        budget: bytes of memory for them there.
        prefetch: act on hints.

    Attributes:
        weights: by layer, the parameter's name and the tensor that its experts are read from.
        places: most experts at once.
        stats: counts since ``begin``.

    Raises:
        UserError: a budget below one layer's experts.
    """

    weights: list[dict[str, Tensor]]

    def __init__(self, layout: Layout, budget: int, prefetch: bool) -> None:
        self._layers = list(layout.values())
        self._bytes = [sum(p.expert_bytes for p in own) for own in self._layers]  # of one, by layer
        self.places = places_within(budget, list(map(_count, self._layers)), self._bytes)
        self._prefetches = prefetch
        self._residency = Residency(len(self._layers), self.places)
        self._ahead: set[Key] = set()  # brought on a hint, and not asked for yet
        self._trust = 0.0  # share of hints that came true
        self._lock = threading.RLock()
        self.stats = OffloadStats()

    @abstractmethod
    def _start(self, key: Key) -> None:
        """Begin to bring an expert, for which there is a place."""

    @abstractmethod
    def _settle(self) -> list[BaseException]:
        """Wait for all that was begun, and admit it; returns what went wrong."""

    @abstractmethod
    def _drop(self, key: Key) -> None:
        """Give up an expert's place."""

    def _ids_there(self, layer: int, ids: Tensor) -> Tensor:
        """Where experts that are there lie in ``weights``; by default at their ids."""
        return ids

    def begin(self) -> OffloadStats:
        """Count from here, in what is returned."""
        self.stats = OffloadStats()
        return self.stats

    @contextmanager
    def resident(self, layer: int, ids: Tensor) -> Iterator[Tensor]:
        """A block in which the experts of a layer that tokens were sent to can be computed.

        Args:
            layer: which of the layers with experts.
            ids: int64 of experts, of any shape; those outside the layer stand for none.

        Yields:
            Where they lie in ``weights``, shaped as ``ids``.

        Raises:
            UserError: one cannot be brought.
        """
        with self._lock:
            self._bring(layer, self._tokens_by_expert(layer, ids))
            if self._prefetches and self._trust >= WORTH:
                self._prefetch(layer)
            yield self._ids_there(layer, ids)

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
        stats.useful += sum(key in residency for key in wanted & self._ahead)
        self._ahead = {key for key in self._ahead if key[0] != layer}
        residency.note_run(layer, tokens)
        missing = [key for key in sorted(wanted) if key not in residency]
        stats.needed += len(wanted)
        stats.missed += len(missing)
        self._replace(layer, missing, wanted)
        failures = self._settle()
        stats.wait += time.perf_counter() - start
        if failures:
            raise failures[0]

    def _prefetch(self, layer: int) -> None:
        """Begin to bring what the next layer's last run used, most tokens first."""
        residency = self._residency
        following = (layer + 1) % residency.layers
        tokens = residency.last_run(following)
        hinted = {(following, expert) for expert in tokens}
        missing = sorted(
            (key for key in hinted if key not in residency), key=lambda key: -tokens[key[1]]
        )
        running = {(layer, expert) for expert in residency.last_run(layer)}
        keep = hinted | running
        chosen = sorted(missing[: room_ahead(residency.places, len(running))])
        begun = self._replace(following, chosen, keep)
        self.stats.prefetched += begun
        self._ahead |= set(chosen[:begun])

    def _replace(self, layer: int, missing: list[Key], keep: set[Key]) -> int:
        """Begin to bring experts of a layer in place of others; returns how many have one."""
        residency = self._residency
        for key in residency.victims(layer, len(missing) - residency.free, keep):
            residency.forget(key)
            self._drop(key)
        begun = missing[: residency.free]
        for key in begun:
            self._start(key)
        self.stats.bytes_read += len(begun) * self._bytes[layer]
        return len(begun)


def _count(projections: list[Projection]) -> int:
    """Experts of a layer."""
    return projections[0].shape[0]

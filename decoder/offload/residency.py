"""Which experts are in memory, and which of them make room for others.

Least recently used, counted in runs of a layer rather than in time. Layers run in a circle, so that
by time the least recently used experts are those of the layers that come next, just what is about
to be needed: a step that uses most experts would find none of them. Counted in runs, experts that
their layer's last run left unused go first. Of those that it used, the ones that go first are of
the layer that ran last, since it is the last to come again, and of a layer's, those with fewest
tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from typing import NamedTuple

Key = tuple[int, int]  # a layer and an expert of it


class _Use(NamedTuple):
    """The last run of its layer that used an expert, and how many tokens it had."""

    run: int
    tokens: int


class Residency:
    """The experts in memory.

    Args:
        layers: how many layers have experts; they run in order, again and again.
        places: most experts in memory.
    """

    def __init__(self, layers: int, places: int) -> None:
        self.layers, self.places = layers, places
        self._uses: dict[Key, _Use] = {}
        self._runs = [0] * layers
        self._last: list[Mapping[int, int]] = [{} for _ in range(layers)]

    def __contains__(self, key: Key) -> bool:
        return key in self._uses

    @property
    def free(self) -> int:
        """Places without an expert."""
        return self.places - len(self._uses)

    def last_run(self, layer: int) -> Mapping[int, int]:
        """Tokens by expert of a layer's last run, experts without any left out."""
        return self._last[layer]

    def note_run(self, layer: int, tokens: Mapping[int, int]) -> None:
        """A layer runs; tokens by expert as of ``last_run``."""
        self._runs[layer] += 1
        self._last[layer] = tokens
        for expert in tokens:
            if (layer, expert) in self._uses:
                self.admit((layer, expert))

    def admit(self, key: Key) -> None:
        """An expert that its layer's last run used is in memory."""
        layer, expert = key
        self._uses[key] = _Use(self._runs[layer], self._last[layer][expert])

    def forget(self, key: Key) -> None:
        """An expert is not in memory any more."""
        self._uses.pop(key, None)

    def victims(self, layer: int, count: int, keep: Collection[Key]) -> list[Key]:
        """Up to ``count`` experts that give up their places for ``layer``, none of ``keep``."""

        def least_wanted(key: Key) -> tuple[int, ...]:
            use = self._uses[key]
            away = (key[0] - layer - 1) % self.layers  # layers that run before it does
            return self._runs[key[0]] - use.run, away, -use.tokens, *key

        if count <= 0:
            return []
        return heapq.nlargest(count, (k for k in self._uses if k not in keep), least_wanted)

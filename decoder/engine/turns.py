"""Whose turn it is to decode: one caller's at a time, whichever threads they are on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Turns:
    """A turn begins when the decoder is idle, and ends where another begins.

    Nothing is held from one step to the next: a caller may go on from another thread, or never.

    Attributes:
        lock: held in a step, in the middle of which a decoder may look idle.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._latest: object = None

    def take(self, is_idle: Callable[[], bool]) -> object:
        """Begin a turn.

        Args:
            is_idle: whether there is no request.

        Returns:
            What ``within`` and ``is_latest`` ask for.

        Raises:
            RuntimeError: there are requests.
        """
        with self.lock:
            if not is_idle():
                raise _busy()
            self._latest = turn = object()
            return turn

    @contextmanager
    def within(self, turn: object) -> Iterator[None]:
        """A block in which no other turn begins.

        Raises:
            RuntimeError: another has begun.
        """
        with self.lock:
            if not self.is_latest(turn):
                raise _busy()
            yield

    def is_latest(self, turn: object) -> bool:
        """Whether no other has begun since."""
        return self._latest is turn


def _busy() -> RuntimeError:
    return RuntimeError("expected an idle decoder, got one that is still streaming")

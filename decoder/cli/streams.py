"""Standard streams that may be closed, full or gone, and signals that end a run."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """A signal asks the process to end; it unwinds as an interrupt does, and nothing is lost."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def exit_code(stop: KeyboardInterrupt) -> int:
    """As shells have it: 128 and the signal's number."""
    return 128 + (stop.signum if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def unwinding_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise ``Terminated`` inside, unless somebody handles or ignores them."""
    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is signal.SIG_DFL:
                previous[signum] = signal.signal(signum, _terminate)
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Inside, writing to standard error never fails; after it, neither does flushing at exit."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened would get its number, and its output
            os.open(os.devnull, os.O_RDWR)
    original, forgiving = sys.stderr, _Forgiving(sys.stderr)
    sys.stderr = forgiving
    # In the C locale the handler is "surrogateescape", which fails on what ASCII does not have.
    if hasattr(sys.stdout, "reconfigure") and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        sys.stderr = open(os.devnull, "w") if forgiving.broken else original  # noqa: SIM115


def silence_stdout() -> None:
    """What standard output cannot take is dropped: the interpreter would fail on it at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def say(text: str) -> None:
    """One line on standard error."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class _Forgiving:
    """Standard error, or nothing where that is closed, full or gone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.broken = False

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        return self._stream is not None and not self.broken and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, method: str, *arguments: str) -> None:
        if self._stream is None or self.broken:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except (OSError, ValueError):
            self.broken = True


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated(signum)

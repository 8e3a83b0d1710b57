"""The cache: what is built once, on this machine, for one user."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from .trust import own_folder


def cache_folder(name: str) -> Path:
    """A folder ``name`` of the cache, made where it is not there: nobody else can write to it.

    The cache is ``$MOESD_CACHE_DIR``, else ``moesd`` in the user's cache folder.

    Raises:
        RuntimeError: others could have written to it.
        OSError: it cannot be made.
    """
    root = os.environ.get("MOESD_CACHE_DIR") or (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesd"
    )
    return own_folder(Path(root), name)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of the cache; another process or thread that wants it waits.

    The system lets go of it when the process ends, however that happens.
    """
    with open(folder / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

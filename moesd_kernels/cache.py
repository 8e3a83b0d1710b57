"""The cache: what is built once, on this machine, for one user.

What something is made of is in its folder's name, so a newer version leaves the older one's folder
behind. Whoever has built one drops those of its kind that were used least recently; never one that
a process holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .trust import own_folder

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"  # ends the name of a folder that is being filled or removed
_held: dict[Path, int] = {}  # open for as long as this process lives


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
    # Whoever sets it in a file rather than a shell writes ~, too.
    return own_folder(Path(root).expanduser(), name)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of the cache; another process or thread that wants it waits.

    The system lets go of it when the process ends, however that happens.
    """
    with open(folder / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def keep(folder: Path) -> bool:
    """Have nobody drop a folder while this process lives, and count it as used now.

    Returns:
        Whether it is there; another process may have dropped it just before.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    with contextlib.suppress(OSError):  # a file system without locks: none is dropped there either
        fcntl.flock(handle, fcntl.LOCK_SH)
    with contextlib.suppress(OSError):  # a cache that is only read
        os.utime(folder)
    if not folder.is_dir() or not os.path.samestat(os.fstat(handle), folder.stat()):
        os.close(handle)
        return False
    earlier = _held.pop(folder, None)
    _held[folder] = handle
    if earlier is not None:
        os.close(earlier)
    return True


def drop_unused(folders: Iterable[Path], most: int) -> None:
    """Remove all but the ``most`` recently used of some folders, and none that is kept.

    What cannot be removed stays: the space is all that it costs.
    """
    with contextlib.suppress(OSError):
        by_use = sorted(folders, key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
        for folder in by_use[most:]:
            _drop(folder)


def _drop(folder: Path) -> None:
    """Remove it unless it is kept; whoever wants it finds it whole or not at all."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder.rename(folder.with_name(folder.name + UNFINISHED)))
            logger.info("removed %s, which newer builds have superseded", folder)
        finally:
            os.close(handle)

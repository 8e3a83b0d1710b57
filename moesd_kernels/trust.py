"""Who could have written a file that is about to be loaded as code.

Permissions are asked once, of a path without links: where they hold, nobody else can change the
file or a folder on the way to it afterwards either, so there is no gap between asking and loading.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterable
from pathlib import Path


def distrust(files: Iterable[Path], owner: int | None = None) -> str | None:
    """Why code may not be loaded from here, or None.

    Each path must belong to the user or to root, and only they may write to it. Folders above may
    belong to anyone, as it is their system; but one that everyone may write to, unless only owners
    may rename in it (``/tmp``), would let everyone put another in the place of these.

    Args:
        files: existing files and folders, without links on the way.
        owner: another user who is trusted as well, as code of theirs runs already.
    """
    for path in files:
        found = path.stat()
        if found.st_uid not in (0, os.geteuid(), owner):
            return f"{path} belongs to {_user(found.st_uid)}"
        if found.st_mode & stat.S_IWOTH:
            return f"{path} can be written to by everyone"
        if found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid, found.st_uid):
            return f"{path} can be written to by group {_group(found.st_gid)}"
        for above in path.parents:
            mode = above.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                return f"{path} lies in {above}, which can be written to by everyone"
    return None


def require_trust(*paths: Path) -> None:
    """Refuse to load code from anywhere else.

    Args:
        paths: as for ``distrust``.

    Raises:
        RuntimeError: why, and what helps.
    """
    reason = distrust(paths)
    links = [path for path in paths if path.is_symlink()]
    if links:
        reason = f"{links[0]} is a link"
    if reason:
        raise RuntimeError(f"{reason}; remove it, or set MOESD_CACHE_DIR to a folder of your own")


def own_folder(root: Path, name: str) -> Path:
    """A folder ``name`` below ``root``, made for the user alone where it is not there.

    Raises:
        RuntimeError: it or ``root`` is there, and others could have written to it.
        OSError: it cannot be made.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = root.resolve() / name
    folder.mkdir(mode=0o700, exist_ok=True)
    require_trust(folder.parent, folder)
    return folder


def _is_private(gid: int, uid: int) -> bool:
    """Whether a group is its user's alone: many systems give each user one, of the same name."""
    return gid == 0 or _group(gid) == _user(uid)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)

"""Which libraries of other sources stay in the cache when a new one has been compiled."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from moesd_kernels import cache, library


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A cache whose libraries are empty files, compiled at once."""
    monkeypatch.setenv("MOESD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library, "missing", lambda device: None)
    monkeypatch.setattr(library, "find_compiler", lambda device: "c++")
    monkeypatch.setattr(library, "compile_library", lambda device, target, c: target.touch(0o755))
    return tmp_path


def compiled(key: str, monkeypatch, used: int = 0) -> Path:
    """The folder of a library, last used at ``used``; let go of, as by a process that has ended."""
    monkeypatch.setattr(library, "_cache_key", lambda device, compiler: key)
    folder = library.compiled_library("cpu").parent
    os.close(cache._held.pop(folder))
    os.utime(folder, (used, used))
    return folder


def test_the_few_that_were_used_last_stay(root, monkeypatch):
    folders = [compiled(f"{i:016x}", monkeypatch, used=100 - i) for i in range(5)]
    assert all(folder.is_dir() for folder in folders)
    new = compiled("f" * 16, monkeypatch)
    assert [folder.is_dir() for folder in folders] == [True, True, True, True, False]
    compiled("0" * 16, monkeypatch)  # there already
    assert sorted(path.name for path in root.iterdir()) == sorted(
        folder.name for folder in [*folders[:4], new]
    )


def test_a_home_that_no_shell_has_filled_in_is_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOESD_CACHE_DIR", "~/kept")
    assert cache.cache_folder("a") == tmp_path / "home" / "kept" / "a"
    assert not (tmp_path / "~").exists()


def test_a_library_in_a_cache_that_is_only_read_is_taken(root, monkeypatch):
    folder = compiled("0" * 16, monkeypatch)
    refused = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(cache, "open", Mock(side_effect=refused), raising=False)
    assert compiled("0" * 16, monkeypatch) == folder
    with pytest.raises(OSError, match="Read-only"):
        compiled("1" * 16, monkeypatch)


def test_what_is_not_a_librarys_stays(root, monkeypatch):
    monkeypatch.setattr(library, "_SPARE", 0)
    kept = [root / name for name in ("smol", "0" * 16, "mine")]
    for folder in kept:
        folder.mkdir()
    (kept[2] / "moesd_cpu.so").touch()
    elsewhere = root / "mine" / ("1" * 16)
    elsewhere.mkdir()
    (elsewhere / "moesd_cpu.so").touch()
    (root / ("1" * 16)).symlink_to(elsewhere)
    compiled("f" * 16, monkeypatch)
    assert all(folder.is_dir() for folder in [*kept, elsewhere, root / ("1" * 16)])


def test_what_another_process_uses_stays_until_that_ends(root, monkeypatch):
    monkeypatch.setattr(library, "_SPARE", 0)
    used = compiled("0" * 16, monkeypatch)
    script = (
        "import sys, pathlib; from moesd_kernels.cache import keep\n"
        "print(keep(pathlib.Path(sys.argv[1])), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(used)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout.readline() == b"True\n"
        compiled("1" * 16, monkeypatch)
        assert used.is_dir()
        user.communicate()
    compiled("2" * 16, monkeypatch)
    assert [path.name for path in root.iterdir()] == ["2" * 16]


def test_what_is_not_there_cannot_be_kept(tmp_path):
    folder = tmp_path / "a"
    assert not cache.keep(folder)
    folder.mkdir()
    assert cache.keep(folder)
    folder.rename(tmp_path / "b")
    folder.mkdir()
    cache.drop_unused([tmp_path / "b"], 0)
    assert (tmp_path / "b").is_dir()
    assert cache.keep(folder)
    cache.drop_unused([tmp_path / "b", folder], 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

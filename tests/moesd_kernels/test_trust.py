"""A library is loaded only where nobody else could have written it."""

from __future__ import annotations

import os
import stat
import sysconfig

import pytest

from moesd_kernels import library, trust


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A cache below which a library is "compiled"; yields its root, the library and what loaded."""
    root = tmp_path / "cache"
    loaded = []
    monkeypatch.setenv("MOESD_CACHE_DIR", str(root))
    monkeypatch.setattr(library, "built_module", lambda device: None)
    monkeypatch.setattr(library, "missing", lambda device: None)
    monkeypatch.setattr(library, "find_compiler", lambda device: "c++")
    monkeypatch.setattr(library, "_cache_key", lambda device, compiler: "key")
    monkeypatch.setattr(library, "compile_library", lambda device, target, c: target.touch(0o755))
    monkeypatch.setattr(library.torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(library, "register_fakes", lambda: None)
    library.load.cache_clear()
    yield root, root / "key" / "moesd_cpu.so", loaded
    library.load.cache_clear()


def test_a_cache_is_made_for_the_user_alone(compiled):
    root, so, loaded = compiled
    before = os.umask(0)
    try:
        assert library.load("cpu") is None
    finally:
        os.umask(before)
    assert loaded == [str(so)]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (root, so.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("part", ["root", "key", "library"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.chmod(0o777), "can be written to by everyone"),
        (lambda path: (os.chown(path, -1, 1), path.chmod(0o775)), "can be written to by group"),
        (lambda path: os.chown(path, 12345, -1), "belongs to 12345"),
    ],
    ids=["everyone's", "a group's", "another's"],
)
def test_what_others_could_have_written_is_not_loaded(compiled, part, spoil, said):
    root, so, loaded = compiled
    so.parent.mkdir(parents=True, mode=0o755)
    so.touch(0o755)
    path = {"root": root, "key": so.parent, "library": so}[part]
    try:
        spoil(path)
    except PermissionError:
        pytest.skip("only root can give files away")
    reason = library.load("cpu")
    assert f"{path} {said}" in reason
    assert "MOESD_CACHE_DIR" in reason
    assert loaded == []


def test_a_folder_above_that_everyone_may_write_to(compiled, tmp_path, monkeypatch):
    _, _, loaded = compiled
    tmp_path.chmod(0o777)
    assert f"lies in {tmp_path}, which can be written to by everyone" in library.load("cpu")
    assert loaded == []
    library.load.cache_clear()
    tmp_path.chmod(0o1777)  # as /tmp is
    assert library.load("cpu") is None


def test_a_link_leads_to_what_is_checked(compiled, tmp_path):
    root, so, loaded = compiled
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o777)
    elsewhere.chmod(0o777)
    root.symlink_to(elsewhere)
    assert f"{elsewhere} can be written to by everyone" in library.load("cpu")
    root.unlink()
    library.load.cache_clear()
    so.parent.mkdir(parents=True, mode=0o700)
    (tmp_path / "other.so").touch(0o755)
    so.symlink_to(tmp_path / "other.so")
    assert f"{so} is a link" in library.load("cpu")
    assert loaded == []


def test_the_groups_that_are_a_users_own(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o775)
    monkeypatch.setattr(trust, "_user", lambda uid: "ada")
    monkeypatch.setattr(trust, "_group", lambda gid: "ada")
    assert trust.distrust([file]) is None
    monkeypatch.setattr(trust, "_group", lambda gid: "staff")
    if file.stat().st_gid == 0:
        assert trust.distrust([file]) is None, "root's own group is root's alone"
    else:
        assert trust.distrust([file]) == f"{file} can be written to by group staff"


def test_a_built_module_that_others_could_have_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    name = library.module_name("cpu").rpartition(".")[2]
    built = tmp_path / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    built.touch(0o755)
    assert library.built_module("cpu") == built
    built.chmod(0o777)
    assert library.built_module("cpu") is None
    assert "can be written to by everyone" in caplog.text
    built.chmod(0o755)
    tmp_path.chmod(0o777)
    assert library.built_module("cpu") is None


def test_who_owns_the_package_may_own_its_module(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    name = library.module_name("cpu").rpartition(".")[2]
    built = tmp_path / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    built.touch(0o755)
    os.chown(built, 12345, -1)
    assert library.built_module("cpu") is None
    os.chown(tmp_path, 12345, -1)
    assert library.built_module("cpu") == built

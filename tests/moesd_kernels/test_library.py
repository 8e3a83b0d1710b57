"""Which built module is loaded: this torch's, no older than any of its sources."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moesd_kernels import library

FILES = {path for path in library.SOURCE_ROOT.rglob("*") if path.is_file()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_current_module_of_this_torch_is_found(device, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert library.built_module(device) is None
    name = library.module_name(device).rpartition(".")[2]
    built = tmp_path / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    built.touch()
    assert library.built_module(device) == built
    os.utime(built, (1, 1))
    assert library.built_module(device) is None, "older than its sources"
    os.utime(built)
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    assert library.built_module(device) is None, "built for another torch"


def test_an_installed_module_is_current_whenever_its_sources_were_unpacked(tmp_path, monkeypatch):
    sources, name = tmp_path / "csrc", library.module_name("cpu").rpartition(".")[2]
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(library, "SOURCE_ROOT", sources)
    monkeypatch.setattr(library, "_INSTALLED", sources)
    sources.mkdir()
    (sources / "register.cpp").touch()
    built = tmp_path / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    built.touch()
    os.utime(built, (1, 1))
    assert library.built_module("cpu") == built


@pytest.mark.parametrize(("device", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_every_source_of_a_device_is_watched(device, other):
    shared = {path for path in FILES if other not in path.relative_to(library.SOURCE_ROOT).parts}
    assert set(library._source_files(device)) == shared


def test_a_sanitizer_is_in_every_call_and_in_no_module_built_without_it(monkeypatch):
    plain = library._source_flags("cpu"), library._link_flags("cpu")
    key = library._cache_key("cpu", "c++")
    monkeypatch.setenv("MOESD_SANITIZE", "address,undefined")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    for name, given in library._source_flags("cpu").items():
        assert set(given) >= {*flags, *plain[0][name]}, name
    assert set(library._link_flags("cpu")) >= {*flags, *plain[1]}
    assert library.built_module("cpu") is None
    assert library._cache_key("cpu", "c++") != key


def test_every_source_is_compiled(monkeypatch):
    monkeypatch.setattr(library, "_is_x86", lambda: True)
    compiled = {name for device in ("cpu", "cuda") for name in library._source_flags(device)}
    sources = {path for path in FILES if path.suffix in (".cpp", ".cu")}
    assert {library.SOURCE_ROOT / name for name in compiled} == sources


def test_what_sees_nothing_of_torch_is_compiled_once_for_every_torch(tmp_path, monkeypatch):
    compiler, calls = tmp_path / "c++", tmp_path / "calls"
    compiler.write_text(
        f'#!/bin/sh\necho "$*" >> {calls}\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo object > "$2"; shift; done\n'
    )
    compiler.chmod(0o755)

    def compiled(version, objects=tmp_path / "objects"):
        monkeypatch.setattr(library, "_TORCH", tmp_path / version)
        calls.unlink(missing_ok=True)
        library.compile_library("cpu", tmp_path / "library.so", str(compiler), objects)
        lines = [line for line in calls.read_text().splitlines() if " -c " in line]
        return {name for name in names if any(f"/{name} -o " in line for line in lines)}

    names = library._source_flags("cpu").keys()
    apart = {name for name in names if name.startswith("cpu/isa/")}
    assert compiled("2.13") == names and apart and compiled("2.12") == names - apart
    assert compiled("2.12", None) == names
    monkeypatch.setenv("MOESD_SANITIZE", "address")
    assert compiled("2.12") == names, "other flags"
    assert len(list((tmp_path / "objects").iterdir())) == 1, "those of before are gone"


def test_a_compiler_may_be_several_words_and_its_path_have_spaces(tmp_path, monkeypatch):
    folder, calls = tmp_path / "my tools", tmp_path / "calls"
    folder.mkdir()
    for name in ("ccache", "c++"):
        (folder / name).write_text(
            f'#!/bin/sh\necho "{name} $*" >> {calls}\n'
            'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo object > "$2"; shift; done\n'
        )
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for given, begins in (
        ("ccache g++ -pipe", "ccache g++ -pipe -"),
        (str(folder / "c++"), "c++ -"),
        ("", "c++ -"),
    ):
        monkeypatch.setenv("CXX", given)
        calls.unlink(missing_ok=True)
        library.compile_library("cpu", tmp_path / "l.so", library.find_compiler("cpu"))
        assert all(line.startswith(begins) for line in calls.read_text().splitlines()), given
    monkeypatch.setenv("CXX", "none g++")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler found .* is 'none g\+\+'"):
        library.find_compiler("cpu")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.skipif(library.load("cpu") is not None, reason=str(library.load("cpu")))
def test_threads_that_load_at_once_register_once(monkeypatch):
    registered = []

    @functools.cache
    def register() -> None:
        time.sleep(0.1)
        registered.append(True)

    monkeypatch.setattr(library, "register_fakes", register)
    library.load.cache_clear()
    with ThreadPoolExecutor(max_workers=4) as pool:
        assert list(pool.map(library.load, ["cpu"] * 4)) == [None] * 4
    assert registered == [True]


def test_make_builds_anew_when_any_source_changes():
    root = library.SOURCE_ROOT.parent
    command = ["make", "--print-data-base", "--question", ".venv/.ready"]
    rules = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    needed = [line for line in rules.splitlines() if line.startswith(".venv/.ready: ")]
    listed = {root / name for line in needed for name in line.split()}
    assert listed >= FILES, sorted(FILES - listed)

"""Loads the C++ operators: the built module if there is one, else compiled once into a cache.

`torch.utils.cpp_extension.load` gives every file the same flags, but each instruction set needs its
own, so the few compiler calls are made here; `setup.py` uses the same `compile_library`. Importing
this module does nothing; without a compiler `load` returns the reason and raises nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE_ROOT = Path(__file__).resolve().parent.parent / "csrc"

# fp-contract=off: a multiply-add is fused only where the source says so, which keeps rows
# bit-identical across code paths.
_COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-Wall", "-ffp-contract=off", "-fvisibility=hidden")
_AVX512_FLAGS = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    "-Wno-maybe-uninitialized",  # false alarms inside GCC's own avx512fintrin.h (GCC bug 105593)
    "-Wno-uninitialized",
)
_BOUNDARY_SOURCES = (
    *("register.cpp", "cpu/dispatch.cpp", "cpu/experts.cpp", "cpu/dense.cpp"),
    *("cpu/attention.cpp", "cpu/rope.cpp", "cpu/layers.cpp"),
)
_X86_SOURCES = {
    "cpu/isa_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "cpu/isa_avx512.cpp": _AVX512_FLAGS,
    "cpu/isa_avx512_bf16.cpp": (*_AVX512_FLAGS, "-mavx512bf16"),
    "cpu/isa_amx.cpp": (*_AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _source_flags() -> dict[str, tuple[str, ...]]:
    """Each source below `SOURCE_ROOT` and the flags it is compiled with."""
    include = [Path(sysconfig.get_paths()["include"])]
    torch_root = Path(torch.__file__).parent / "include"
    include += [torch_root, torch_root / "torch" / "csrc" / "api" / "include"]
    boundary = ["-fopenmp", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    if _is_x86():
        boundary.append("-DMOESD_X86_KERNELS")
    for path in include:
        boundary += ["-isystem", str(path)]
    flags = dict.fromkeys(_BOUNDARY_SOURCES, (*_COMMON_FLAGS, *boundary))
    flags["cpu/isa_portable.cpp"] = _COMMON_FLAGS
    if _is_x86():
        flags |= {name: (*_COMMON_FLAGS, *isa) for name, isa in _X86_SOURCES.items()}
    return flags


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    if done.stderr:
        logger.debug("%s", done.stderr)


def find_compiler() -> str | None:
    """$CXX, c++ or g++; None when there is none."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def compile_library(target: Path, compiler: str) -> None:
    """Compiles every CPU source and links them into the shared library `target`.

    Args:
        target: path of the library; its directory must exist.
        compiler: a C++20 compiler that takes GCC's flags.

    Raises:
        RuntimeError: the compiler failed; carries its last output.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        jobs = []
        for name, flags in _source_flags().items():
            compiled = Path(folder) / (Path(name).stem + ".o")
            jobs.append([compiler, *flags, "-c", str(SOURCE_ROOT / name), "-o", str(compiled)])
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(_run, jobs))
        libraries = Path(torch.__file__).parent / "lib"
        linked = Path(folder) / target.name
        link = (f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-ltorch", "-lc10")
        objects = [job[-1] for job in jobs]
        _run([compiler, "-shared", "-fopenmp", "-o", str(linked), *objects, *link])
        os.replace(linked, target)


def _source_files() -> list[Path]:
    return sorted([*SOURCE_ROOT.glob("*.cpp"), *(SOURCE_ROOT / "cpu").glob("*.*")])


def _built_module_is_current() -> bool:
    """Whether moesd_kernels._C exists and is no older than the sources beside it, if any."""
    spec = importlib.util.find_spec("moesd_kernels._C")
    if spec is None or spec.origin is None:
        return False
    built = Path(spec.origin).stat().st_mtime
    return all(path.stat().st_mtime <= built for path in _source_files())


def _cache_key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(f"{torch.__version__}\n{version}\n{_source_flags()}".encode())
    for path in _source_files():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _compiled_library() -> Path:
    """The cached library for these sources, this torch and this compiler; built when missing."""
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler found (c++, g++ or $CXX)")
    if not SOURCE_ROOT.is_dir():
        raise RuntimeError(f"no built module moesd_kernels._C and no sources at {SOURCE_ROOT}")
    root = os.environ.get("MOESD_CACHE_DIR") or (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesd"
    )
    folder = Path(root) / _cache_key(compiler)
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "moesd_cpu.so"
    with _locked(folder / "lock"):
        if not library.exists():
            started = time.perf_counter()
            compile_library(library, compiler)
            logger.info("compiled the CPU kernels in %.0f s", time.perf_counter() - started)
    return library


@functools.cache
def load() -> str | None:
    """Registers the `torch.ops.moesd` operators.

    Returns:
        None when they can be called, otherwise why not; the reason is logged once.
    """
    try:
        if _built_module_is_current():
            importlib.import_module("moesd_kernels._C")
        else:
            torch.ops.load_library(str(_compiled_library()))
    except (RuntimeError, OSError, ImportError) as error:
        reason = f"C++ CPU kernels unavailable: {error}"
        logger.warning("%s", reason)
        return reason
    return None

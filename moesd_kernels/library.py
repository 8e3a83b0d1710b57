"""Loads the C++ operators: the built module if there is one, else compiled once into a cache.

``torch.utils.cpp_extension.load`` gives every file the same flags, but each instruction set needs
its own, and it guesses where CUDA's libraries are, which nvcc knows; so the few compiler calls are
made here, and ``setup.py`` makes the same ones. Devices are "cpu" and "cuda"; the CUDA library
implements schemas that the CPU library holds, and building it needs no GPU.

A built module carries in its name the torch it was built for: another torch does not find it, where
it would load it and break. A library that others could have written is code of theirs and is not
loaded (``trust.py``). Importing this module does nothing; without a compiler ``load`` returns the
reason and raises nothing.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

from .cache import cache_folder, drop_unused, keep, locked
from .compiler import find_compiler, run, version_of
from .fakes import register_fakes
from .registered import register_kernels
from .trust import distrust, require_trust

logger = logging.getLogger(__name__)

_INSTALLED = Path(__file__).resolve().parent / "csrc"  # by setup.py, with what it built
SOURCE_ROOT = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "csrc"
_TORCH = Path(torch.__file__).parent
_KEY = 16  # hexadecimal digits in the name of a library's cache folder
_SPARE = 4  # libraries of other checkouts or flags that stay when a new one has been compiled

# fp-contract=off: a multiply-add is fused only where the source says so, which keeps rows
# bit-identical across code paths.
_COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-Wall", "-ffp-contract=off", "-fvisibility=hidden")
_AVX512_FLAGS = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    "-Wno-maybe-uninitialized",  # false alarms inside GCC's own avx512fintrin.h (GCC bug 105593)
    "-Wno-uninitialized",
)
_AVX512_BF16_FLAGS = (*_AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni")
_CUDA_FLAGS = (
    *("-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    "-gencode=arch=compute_90a,code=sm_90a",  # wgmma exists there only, not on plain sm_90
)
_X86_SOURCES = {
    "cpu/isa/isa_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "cpu/isa/isa_avx512.cpp": _AVX512_FLAGS,
    "cpu/isa/isa_avx512_bf16.cpp": _AVX512_BF16_FLAGS,
    "cpu/isa/isa_amx.cpp": (*_AVX512_BF16_FLAGS, "-mamx-tile", "-mamx-bf16"),
}


def _sanitizer_flags() -> tuple[str, ...]:
    """Flags of ``$MOESD_SANITIZE`` (``make test-sanitized``): GCC's names, such as "address"."""
    names = os.environ.get("MOESD_SANITIZE")
    # -O1: the kernels' unrolled loops take minutes to compile with checks in them otherwise.
    return (f"-fsanitize={names}", "-fno-sanitize-recover=all", "-O1", "-g1") if names else ()


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _names(pattern: str) -> list[str]:
    """Sources below ``SOURCE_ROOT``, relative to it, in order."""
    return sorted(str(path.relative_to(SOURCE_ROOT)) for path in SOURCE_ROOT.glob(pattern))


def _source_flags(device: str) -> dict[str, tuple[str, ...]]:
    """Each source below ``SOURCE_ROOT`` and the flags it is compiled with."""
    boundary = [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    boundary += ["-isystem", str(_TORCH / "include")]
    if device == "cuda":
        return dict.fromkeys(_names("cuda/*.cu"), (*_CUDA_FLAGS, *boundary))
    boundary.append("-fopenmp")
    if _is_x86():
        boundary.append("-DMOESD_X86_KERNELS")
    meets_torch = ["register.cpp", *_names("cpu/ops/*.cpp")]
    common = (*_COMMON_FLAGS, *_sanitizer_flags())
    flags = dict.fromkeys(meets_torch, (*common, *boundary))
    flags["cpu/isa/isa_portable.cpp"] = common
    if _is_x86():
        flags |= {name: (*common, *isa) for name, isa in _X86_SOURCES.items()}
    return flags


def _link_flags(device: str) -> list[str]:
    libraries = str(_TORCH / "lib")
    flags = ["-shared", f"-L{libraries}", "-Xlinker", f"-rpath={libraries}"]
    flags += ["-ltorch_cpu", "-ltorch", "-lc10"]
    if device == "cuda":
        return [*flags, "-cudart=shared", "-ltorch_cuda", "-lc10_cuda"]
    return [*flags, "-fopenmp", *_sanitizer_flags()]


def compile_library(device: str, target: Path, compiler: str, objects: Path | None = None) -> None:
    """Compiles every source of a device and links them into the shared library ``target``.

    Args:
        device: "cpu" or "cuda".
        target: path of the library; its directory must exist.
        compiler: what ``find_compiler`` found.
        objects: folder in which what sees nothing of torch, more than half of the work, is found
            again when the same sources are compiled for another torch.

    Raises:
        RuntimeError: the compiler failed; carries its last output.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sources = _source_flags(device)
        places = dict.fromkeys(sources, Path(folder))
        if objects is not None:
            apart = {k: v for k, v in sources.items() if str(_TORCH / "include") not in v}
            kept = objects / _digest(device, version_of(compiler), apart)
            for old in {*objects.glob("*")} - {kept}:
                shutil.rmtree(old)
            places |= dict.fromkeys(apart, kept)

        def compiled(name: str) -> str:
            return str(_compiled(name, sources[name], compiler, places[name]))

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            parts = list(pool.map(compiled, sources))
        linked = Path(folder) / target.name
        run(compiler, "-o", str(linked), *parts, *_link_flags(device))
        linked.chmod(0o755)  # whatever the umask: nobody else may write to code
        os.replace(linked, target)


def _compiled(name: str, flags: Sequence[str], compiler: str, folder: Path) -> Path:
    """The object of a source in ``folder``, made there where it is not."""
    made = folder / f"{name.replace('/', '-')}.o"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}")
        run(compiler, *flags, "-c", str(SOURCE_ROOT / name), "-o", str(part))
        os.replace(part, made)
    return made


def module_name(device: str) -> str:
    """The module that ``setup.py`` builds for a device with this torch."""
    return f"moesd_kernels._C_{device}_torch_{re.sub(r'[^0-9a-z]', '_', torch.__version__)}"


def built_module(device: str) -> Path | None:
    """The module built beside this file for ``device``.

    None where there is none, one of a checkout's sources is newer, others could have written it, or
    a sanitizer is asked for, which it was built without. Who owns the package is trusted: it runs
    already.
    """
    if _sanitizer_flags():
        return None
    name = module_name(device).rpartition(".")[2] + sysconfig.get_config_var("EXT_SUFFIX")
    package = Path(__file__).resolve().parent
    if not (package / name).exists():
        return None
    path = (package / name).resolve()
    if reason := distrust([path.parent, path], owner=package.stat().st_uid):
        logger.warning("the built module is not loaded: %s", reason)
        return None
    built = path.stat().st_mtime
    sources = [] if SOURCE_ROOT == _INSTALLED else _source_files(device)
    return path if all(source.stat().st_mtime <= built for source in sources) else None


def missing(device: str) -> str | None:
    """Why ``load`` would fail before it compiles anything, or None."""
    if built_module(device) is not None:
        return None
    unbuilt = f"{module_name(device)} is not built"
    if not SOURCE_ROOT.is_dir():
        return f"{unbuilt}, and there are no sources at {SOURCE_ROOT}"
    try:
        find_compiler(device)
    except RuntimeError as error:
        return f"{unbuilt}, and it cannot be: {error}"
    return None


def _source_files(device: str) -> list[Path]:
    return sorted([*SOURCE_ROOT.glob("*.*"), *(SOURCE_ROOT / device).rglob("*.*")])


def _cache_key(device: str, compiler: str) -> str:
    flags = _source_flags(device), _link_flags(device)
    return _digest(device, torch.__version__, version_of(compiler), *flags)


def _digest(device: str, *facts: object) -> str:
    """Of facts and of a device's sources."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in _source_files(device):
        digest.update(str(path.relative_to(SOURCE_ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:_KEY]


def compiled_library(device: str) -> Path:
    """The cached library for these sources, this torch and this compiler; built when missing."""
    reason = missing(device)
    if reason is not None:
        raise RuntimeError(reason)
    compiler = find_compiler(device)
    key = _cache_key(device, compiler)
    while not keep(folder := cache_folder(key)):
        pass  # dropped between the two calls: made anew
    library = folder / f"moesd_{device}.so"
    # One that is there needs no lock, which a cache that is only read would refuse.
    with nullcontext() if library.exists() else locked(folder):
        if not library.exists():
            started = time.perf_counter()
            compile_library(device, library, compiler)
            seconds = time.perf_counter() - started
            logger.info("compiled the %s kernels in %.0f s", device.upper(), seconds)
            drop_unused(_other_libraries(folder), _SPARE)
    require_trust(library)
    return library


def _other_libraries(folder: Path) -> set[Path]:
    """Cache folders of libraries for other sources, compilers or releases of torch.

    The cache's root may be a folder that other programs write to.
    """
    found = {library.parent for library in folder.parent.glob("*/moesd_*.so")}
    named = re.compile(f"[0-9a-f]{{{_KEY}}}")
    return {other for other in found - {folder} if named.fullmatch(other.name)}


_loading = threading.Lock()  # threads may come at once: what is registered twice is refused


@functools.cache
def load(device: str, /) -> str | None:
    """Registers the ``torch.ops.moesd`` operators of a device; the CPU's first.

    Returns:
        None when they can be called, otherwise why not; the reason is logged once.
    """
    with _loading:
        try:
            torch.ops.load_library(str(built_module(device) or compiled_library(device)))
        except (RuntimeError, OSError) as error:
            reason = f"C++ {device.upper()} kernels unavailable: {error}"
            logger.warning("%s", reason)
            return reason
        if device == "cpu":
            register_fakes()
            register_kernels()
        return None

"""The compilers of the C++ operators: which there are, and how they are called."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess

import torch

logger = logging.getLogger(__name__)


def find_compiler(device: str) -> str:
    """A shell's words of a C++20 compiler with GCC's flags, or of the nvcc of this torch's CUDA.

    Raises:
        RuntimeError: there is none.
    """
    if device == "cpu":
        given = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
        words = [given] if shutil.which(given) else shlex.split(given)  # or "ccache c++"
        if not words or shutil.which(words[0]) is None:
            raise RuntimeError(f"no C++ compiler found (c++, g++ or $CXX, which is {given!r})")
        return shlex.join(words)
    if torch.version.cuda is None:
        raise RuntimeError("torch is built without CUDA")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if not compiler:
        raise RuntimeError(f"no nvcc found (on the path or in {home}/bin, which is $CUDA_HOME)")
    compiler = shlex.quote(compiler)
    release = re.search(r"release (\d+)", version_of(compiler))
    if release is None or release[1] != torch.version.cuda.partition(".")[0]:
        found = "unknown" if release is None else release[1]
        raise RuntimeError(f"torch is built for CUDA {torch.version.cuda}, nvcc is of CUDA {found}")
    return compiler


def version_of(compiler: str) -> str:
    """What a compiler says of its version."""
    command = [*shlex.split(compiler), "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def run(compiler: str, *arguments: str) -> None:
    """Call it.

    Args:
        compiler: what ``find_compiler`` found.
        arguments: each a word.

    Raises:
        RuntimeError: it failed; carries its last output.
    """
    done = subprocess.run([*shlex.split(compiler), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{compiler} {' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    if done.stderr:
        logger.debug("%s", done.stderr)

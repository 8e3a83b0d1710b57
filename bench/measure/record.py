"""JSON lines with their environment: the only form in which a measurement leaves ``bench``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("csrc", "moesd_kernels", "decoder", "bench")
SOURCE_SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
LIBRARIES = ("torch", "transformers", "triton", "numpy", "scipy")
VARIABLES = ("MOESD_CPU_ISA", "THP_MEM_ALLOC_ENABLE")  # that change what a command measures
_BEGINNING = b'{"kind"'  # of every line


def device_name(device: torch.device | str = "cpu") -> str:
    """Marketing name of a device: the GPU's, or the CPU's with its thread count."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def git_commit() -> str:
    """Short commit of the checkout, with ``+`` when the tree has uncommitted changes.

    In a copy without its repository, as it is carried to a machine for a measurement, a digest of
    the sources instead: ``sources-…``, the same wherever they are the same.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    if shutil.which("git") is None or not (commit := git("rev-parse", "--short", "HEAD")):
        return f"sources-{sources_digest()}"
    return f"{commit}{'+' if git('status', '--porcelain', '--untracked-files=no') else ''}"


def sources_digest() -> str:
    """Twelve hexadecimal digits of everything that is compiled or interpreted."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*")):
        if path.suffix in SOURCE_SUFFIXES:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a reader needs to repeat a line: device, versions, commit, command."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return {
        "device": device_name(device),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": git_commit(),
        "command": " ".join([*variables, "python -m bench", *sys.argv[1:]]),
    }


class Recorder:
    """Appends lines to a file (nowhere when ``path`` is None), each flushed when finished."""

    def __init__(self, path: str | Path | None, device: torch.device | str = "cpu") -> None:
        self.path = Path(path) if path else None
        self.environment = environment(device)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one line ``{"kind": kind, **fields, "env": …}`` and return it."""
        line = {"kind": kind, **fields, "env": self.environment}
        if self.path:
            end_with_a_whole_line(self.path)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return line


def end_with_a_whole_line(path: Path) -> None:
    """Cut off what a process that was killed while writing left at a file's end.

    Another last line that lacks its line break, as editors leave it, is given one.
    """
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        content = file.read()
        begin = content.rfind(b"\n") + 1
        last = content[begin:]
        if (last.startswith(_BEGINNING) or _BEGINNING.startswith(last)) and not _is_json(last):
            file.truncate(begin)
        else:
            file.write(b"\n")


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def read_lines(paths: Iterable[str | Path], kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Lines of the files (or of every ``*.jsonl`` below a folder), optionally of one kind.

    Raises:
        ValueError: a line is not a JSON object; names file and line number.
    """
    for path in map(Path, paths):
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        for file in files:
            for number, text in enumerate(file.read_text().splitlines(), start=1):
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}:{number} is not JSON: {error}") from None
                if not isinstance(line, dict):
                    raise ValueError(f"{file}:{number} must be a JSON object, got {text[:40]}")
                if kind is None or line.get("kind") == kind:
                    yield line

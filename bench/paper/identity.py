"""Which files a line is of, told without where they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bench.workloads.trained import TrainedPair
from decoder.builtin import BUILTIN
from decoder.checkpoint.folder import model_folder

# What a model's outputs depend on; a card or a licence beside it does not change them.
SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
# Bytes of a file's parts, and how many; weights as a whole would take minutes to read.
PART, PARTS = 1 << 16, 64


def pair_identity(pair: TrainedPair) -> dict[str, str | None]:
    """What tells a pair from others of its name: nothing where the name is of a preset.

    Raises:
        UserError: there is no model at a path.
    """
    files = {"target_files": pair.target, "draft_files": pair.draft}
    given = pair.name not in BUILTIN
    return {name: _model(path) if given and path else None for name, path in files.items()}


def file_identity(path: Path) -> str | None:
    """Digest of a data set's file, None where it is not at hand."""
    return _digest([path]) if path.is_file() else None


def _model(path: Path) -> str:
    """Name and digest of a GGUF file, or of a folder's configuration, tokenizer and weights."""
    folder = None if path.is_file() else model_folder(path)
    files = [path] if folder is None else sorted(x for x in folder.iterdir() if x.is_file())
    kept = [x for x in files if folder is None or x.suffix in SUFFIXES]
    return f"{path.resolve().name} {_digest(kept)}"


def _digest(files: list[Path]) -> str:
    """Sixteen hexadecimal digits of the files' names and sizes, and of parts all over them."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for begin in range(0, size, max(PART, size // PARTS)):
                file.seek(begin)
                digest.update(file.read(PART))
    return digest.hexdigest()[:16]

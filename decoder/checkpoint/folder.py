"""From a path or a hub name to a folder whose files may be read.

A link may lead to another file of the folder, or into the blobs of a hub cache, which is how such a
cache is made; any other would read what the folder's maker has no business with.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from decoder.errors import UserError, explained

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_FROM_HUB = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_NOT_FROM_HUB = ("*/*", "consolidated*")  # other formats' copies of the same weights
_LFS_POINTER = b"version https://git-lfs"
# transformers takes such a folder for a distributed checkpoint, whatever its index says.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_GGUF = ".gguf"
_FOREIGN = {
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
}


def model_folder(name: str | Path, what: str = "model") -> Path:
    """The folder of a model, tokenizer, draft or head; every file in it may be opened.

    Args:
        name: a directory, or ``"owner/name"`` on the model hub, whose configuration, tokenizer and
            safetensors files are downloaded to the hub's cache unless they are there.
        what: for messages.

    Raises:
        UserError: no such folder, a foreign format, an adapter, or a link that leads out of it.
    """
    with explained(f"cannot read {what} {str(name)!r}"):
        path = Path(name)
        if str(name) and path.is_dir():
            folder = path
        elif str(name) and path.exists():
            raise UserError(
                f"{what} must be a directory, got the file {str(name)!r}{_hint([path])}"
            )
        elif could_be_hub_name(str(name)):
            folder = _from_hub(str(name), what)
        else:
            raise UserError(f"{what} path {str(name)!r} does not exist")
        entries = sorted(folder.iterdir())
        for entry in entries:
            _require_own_file(entry)
        _require_a_model(folder, entries, what)
    return folder


def is_gguf(path: str | Path) -> bool:
    """Whether this is a GGUF file, which holds a whole model and its tokenizer."""
    return Path(path).suffix == _GGUF and Path(path).is_file()


def inside(folder: Path, file: Path) -> bool:
    """Whether a file of a folder, links followed, lies in it or in its hub cache's blobs."""
    own, target = folder.resolve(), file.resolve()
    blobs = own.parent.parent / "blobs"
    in_cache = own.parent.name == "snapshots" and blobs.is_dir()
    return target.is_relative_to(own) or (in_cache and target.is_relative_to(blobs))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file, not UTF-8, not JSON, or not an object.
    """
    with explained(f"cannot read {file}"):
        require_content(file)
        fields = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise UserError(f"{file} must hold a JSON object, got {type(fields).__name__}")
    return fields


def require_content(file: Path) -> None:
    """Refuse a file that is empty or stands for one that git-lfs has not fetched."""
    with file.open("rb") as opened:
        start = opened.read(len(_LFS_POINTER))
    if not start:
        raise UserError(f"{file} is empty")
    if start == _LFS_POINTER:
        raise UserError(f"{file} is a pointer of git-lfs, not the file itself: run `git lfs pull`")


@contextmanager
def running_no_code(folder: Path) -> Iterator[None]:
    """transformers' advice to trust a folder's code becomes the line that it is never run."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(f"{folder} needs Python code of its own, which is never run") from error


def foreign_format(entries: list[Path]) -> str | None:
    """What to say where a model's files are in another format than safetensors."""
    for entry in entries:
        if entry.suffix == _GGUF:
            return f"a GGUF file is given by its own path, such as {entry}"
        if entry.suffix in _FOREIGN:
            return f"{_FOREIGN[entry.suffix]} is not supported: expected safetensors"
    return None


def could_be_hub_name(text: str) -> bool:
    """Whether it may be "owner/name"; anything else that does not exist is a mistyped path."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def _from_hub(name: str, what: str) -> Path:
    from huggingface_hub import snapshot_download

    with explained(f"{what} {name!r} is no directory here, and cannot be had from the model hub"):
        options: dict[str, Any] = {
            "allow_patterns": list(_FROM_HUB),
            "ignore_patterns": list(_NOT_FROM_HUB),
        }
        return Path(snapshot_download(name, **options))


def _require_own_file(entry: Path) -> None:
    if entry.is_symlink() and not inside(entry.parent, entry):
        raise UserError(f"{entry} is a link out of its folder, to {entry.resolve()}")
    mode = entry.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{entry} is neither a file nor a folder")


def _require_a_model(folder: Path, entries: list[Path], what: str) -> None:
    names = {entry.name for entry in entries}
    if not names:
        raise UserError(f"{what} {folder} is an empty folder")
    if any(_DISTRIBUTED.fullmatch(name) for name in names):
        raise UserError(f"{folder} holds a distributed checkpoint, expected model.safetensors")
    if "adapter_config.json" in names:
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json), expected a whole model: merge the "
            "adapter into its base model and save that"
        )
    if CONFIG not in names:
        raise UserError(f"{folder} has no {CONFIG}{_hint(entries)}")


def _hint(entries: list[Path]) -> str:
    found = foreign_format(entries)
    return f"; {found}" if found else ""

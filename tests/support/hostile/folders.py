"""Folders of models, whole and then spoiled: what loading must refuse in one line."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.tiny import FAMILIES, save_tokenizer, tiny_model
from torch import Tensor

from decoder.errors import UserError

Change = Callable[[Path], Any]
WEIGHTS = "model.safetensors"
MARKER = "ran"  # the file that planted code leaves beside the folder


def whole(folder: Path, family: str = "qwen3_moe", **changes: Any) -> Path:
    """A tiny model with a tokenizer that decodes."""
    assert family in FAMILIES
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    save_tokenizer(folder, [f"w{index}" for index in range(model.config.vocab_size)])
    return folder


def copied(folder: Path, to: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(folder, to))


def planted(folder: Path, *names: str) -> None:
    """Python files that leave a marker beside the folder when any of them is run."""
    for name in names:
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        marker = str(folder.parent / MARKER)
        file.write_text(f"open({marker!r}, 'w').close()\nclass Any: pass\ngenerate = Any\n")


def edited(name: str, **changes: Any) -> Change:
    """Sets keys of a JSON file."""

    def change(folder: Path) -> None:
        file = folder / name
        fields = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(fields | changes))

    return change


def written(name: str, content: str | bytes) -> Change:
    """Replaces a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def removed(*names: str) -> Change:
    """Removes files."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def together(*changes: Change) -> Change:
    """One after the other."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Change:
    """Changes the dictionary of tensors; what ``edit`` returns, if anything, replaces it."""

    def change(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        held = edit(held) or held
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / WEIGHTS)

    return change


def without(part: str) -> Change:
    """Drops the tensors in whose names this is."""
    return tensors(lambda held: {n: t for n, t in held.items() if part not in n})


def renamed(old: str, new: str) -> Change:
    """Calls tensors otherwise."""
    return tensors(lambda held: {n.replace(old, new): t for n, t in held.items()})


def header(
    fields: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> bytes:
    """A safetensors file with any header; ``length`` is what it says of it."""
    raw = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def digest(folder: Path) -> dict[str, Any]:
    """Everything below a folder, to see that it was left alone."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@contextmanager
def refused(folder: Path, said: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whatever is done inside is refused in one line; nothing ran, was asked or was written."""
    answers = StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", answers)
    before = digest(folder)
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert said in message, message
    assert message.isprintable()
    assert len(message) < 1200, message
    assert answers.tell() == 0, "an answer was read from standard input"
    assert not list(folder.parent.glob(f"**/{MARKER}")), "code of the folder ran"
    assert digest(folder) == before

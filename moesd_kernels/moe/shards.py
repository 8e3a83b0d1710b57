"""A checkpoint's safetensors files: which tensors there are, by the headers, and one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# By safetensors' names.
_DTYPES = {
    "BOOL": torch.bool,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class Header(NamedTuple):
    """What a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Shards:
    """The tensors of one safetensors file, or of a folder of them; nothing is read before ``read``.

    Of a folder, ``model.safetensors`` where there is one, whatever lies beside it: that is what
    transformers reads. Else its index says which file to open for a tensor; without, all are read.

    Args:
        path: a safetensors file or a folder.

    Raises:
        FileNotFoundError: no safetensors file at ``path``.
        ValueError: a file or an index cannot be read, or two files have a tensor of one name.
    """

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self._opened: dict[Path, tuple[Any, frozenset[str]]] = {}
        whole, self._index = path / "model.safetensors", path / "model.safetensors.index.json"
        if not whole.exists() and self._index.is_file():
            self._files = self._indexed()
        else:
            self._files = self._listed(whole if whole.exists() else path)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def header(self, name: str) -> Header:
        """Shape and dtype of a tensor.

        Raises:
            FileNotFoundError: the index names a file that is not there.
            ValueError: its file cannot be read, or does not hold it.
        """
        file = self._files[name]
        opened, names = self._open(file)
        if name not in names:
            raise ValueError(f"{self._index} says that {name} is in {file.name}, which has none")
        held = opened.get_slice(name)
        if (stored := str(held.get_dtype())) not in _DTYPES:
            raise ValueError(f"{name} is stored as {stored}, which is not read")
        return Header(tuple(held.get_shape()), _DTYPES[stored])

    def read(self, name: str) -> Tensor:
        """The tensor."""
        file = self._files[name]
        with _readable(file):
            tensor: Tensor = self._open(file)[0].get_tensor(name)
            return tensor

    def _open(self, file: Path) -> tuple[Any, frozenset[str]]:
        """The open file, and the names of its tensors."""
        from safetensors import safe_open

        if file not in self._opened:
            if not file.is_file():
                raise FileNotFoundError(f"{self._index} names {file.name}, which is not there")
            with _readable(file):
                opened = self._stack.enter_context(safe_open(file, framework="pt"))
            self._opened[file] = opened, frozenset(opened.keys())
        return self._opened[file]

    def _indexed(self) -> dict[str, Path]:
        with _readable(self._index):
            content = json.loads(self._index.read_text(encoding="utf-8"))
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(weight_map, dict):
                raise ValueError("expected an object with a weight_map")
            for file in weight_map.values():
                safe = isinstance(file, str) and Path(file).name == file
                if not safe or not file.endswith(".safetensors"):
                    raise ValueError(f"it must name safetensors files of its folder, got {file!r}")
        return {name: self._index.parent / file for name, file in weight_map.items()}

    def _listed(self, path: Path) -> dict[str, Path]:
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no safetensors file at {path}")
        found: dict[str, Path] = {}
        for file in files:
            for name in sorted(self._open(file)[1]):
                if name in found:
                    raise ValueError(f"{name} of {file.name} is also in {found[name].name}")
                found[name] = file
        return found


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error

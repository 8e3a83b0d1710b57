"""The file of tuned tiles, entry by entry; ``moesd_kernels.experts.triton.tuned`` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesd_kernels.experts.triton.types import LayerShape


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"entries": []}


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("E", "K", "H", "I", "gated", "dtype", "T"))


def has_entry(path: Path, shape: LayerShape, dtype: str) -> bool:
    """Whether the file has tiles for this layer, dtype and number of tokens."""
    key = (*shape.layer, dtype, shape.T)
    return any(_key(entry) == key for entry in _read(path)["entries"])


def write_entry(path: Path, device_name: str, entry: dict[str, Any]) -> None:
    """Put one entry into the device's file, in place of one with the same key."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    others = [old for old in _read(path)["entries"] if _key(old) != _key(entry)]
    entries = sorted([*others, entry], key=_key)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"device": device_name, "triton": triton_version})[:-1]
    lines = ",\n".join(f" {json.dumps(entry)}" for entry in entries)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{head}, "entries": [\n{lines}\n]}}\n')
    partial.replace(path)

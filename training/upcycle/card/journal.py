"""Measured cells in a JSON-lines file, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.checkpoint import cut_half_line


class Journal:
    """Cells by what was measured; a last line cut short by an interruption is measured again.

    Args:
        path: the file; made when it is not there.

    Attributes:
        cells: those asked for so far, in that order: what was measured and its values, as one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = {}
        self.cells: list[dict[str, Any]] = []
        if path.exists():
            cut_half_line(path)
            for line in map(json.loads, path.read_text().splitlines()):
                self._known[_name(line["what"])] = line["values"]

    def cell(
        self, what: Mapping[str, Any], measure: Callable[..., dict[str, Any]], *args: Any
    ) -> None:
        """Take a cell's values from the file, or measure them with ``args``, write and say so."""
        name = _name(what)
        if name not in self._known:
            start = time.perf_counter()
            values = measure(*args)
            values["seconds"] = round(time.perf_counter() - start, 1)
            with self._path.open("a") as file:
                file.write(json.dumps({"what": what, "values": values}) + "\n")
            self._known[name] = values
            print(f"{values['seconds']:.1f} s: {name}", flush=True)
        self.cells.append({**what, **self._known[name]})


def _name(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True)


def digest(value: Any) -> str:
    """Sixteen digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """Sixteen digits of the SHA-256 of a model's weights, file by file in the order of names."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]

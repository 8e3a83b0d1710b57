"""Lines that have what pages, pictures and fits read of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.measure.record import read_lines

_CELL = ("target", "batch", "gamma", "sigma", "speedup", "target_efficiency", "env")
# By kind; lines of others are only told in tables, where a field may be missing.
FIELDS: dict[str, tuple[str, ...]] = {
    "decode": (*_CELL, "top_k"),
    "trained": (*_CELL, "drafter", "data", "temperature", "alpha", "decided"),
    "kernel": (
        *("shape", "dtype", "routing", "backend", "B", "gamma", "T", "of_roof", "floor_s"),
        *("seconds", "ratio", "env"),
    ),
    "generate": ("target", "B", "variant", "tokens_per_s", "times_faster_than", "env"),
    "auto": ("target", "alpha", "batch", "against_best", "env"),
    "compare": ("temperature", "verifier", "identical", "sequences"),
    "humaneval": ("identical", "sequences"),
    "fit": ("model", "error"),
}


def whole_lines(paths: Iterable[str | Path], kind: str | None = None) -> Iterator[dict[str, Any]]:
    """``read_lines``, held to ``FIELDS``.

    Raises:
        ValueError: a line is not a JSON object, or lacks a field of its kind.
    """
    for line in read_lines(paths, kind):
        missing = [name for name in FIELDS.get(str(line.get("kind")), ()) if name not in line]
        if missing:
            has = ", ".join(sorted(line))
            raise ValueError(f"a {line['kind']} line needs {', '.join(missing)}, got {has}")
        yield line

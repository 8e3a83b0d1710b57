"""What a suite's folder already holds: lines to add to, and pieces that need not run again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.measure.record import Recorder, end_with_a_whole_line

FILE = "suite.jsonl"


class Tail:
    """Reads a file that another process adds lines to."""

    def __init__(self, file: Path) -> None:
        self.file, self.offset = file, 0

    def new(self) -> list[dict[str, Any]]:
        """Whole lines added since the last call; half a line is left for the next."""
        if not self.file.exists():
            return []
        with self.file.open("rb") as file:
            file.seek(self.offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [json.loads(text) for text in whole.splitlines()]


class Lines(Recorder):
    """The folder's lines, old ones and those written now."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(folder / FILE, device)
        self.seen = Tail(folder / FILE).new()
        self._marks: dict[str, Any] = {}

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        """As ``Recorder.write``, remembered."""
        line = super().write(kind, **fields, **self._marks)
        self.seen.append(line)
        return line

    @contextmanager
    def marked(self, **fields: Any) -> Iterator[None]:
        """Lines written inside carry these fields, too."""
        self._marks = fields
        try:
            yield
        finally:
            self._marks = {}

    def find(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Lines of a kind whose fields have these values."""
        return [
            line
            for line in self.seen
            if line["kind"] == kind and all(line.get(k) == v for k, v in fields.items())
        ]

    def states(self) -> dict[str, dict[str, Any]]:
        """The latest ``piece`` line of every piece that was ever begun, by name."""
        return {line["name"]: line for line in self.find("piece")}

    def states_of_this_start(self) -> dict[str, dict[str, Any]]:
        """The same since the last ``start`` line."""
        return {line["name"]: line for line in self._pieces_of_this_start()}

    def lost_in_this_start(self, name: str | None = None) -> list[str]:
        """Points of a piece, or of all, at which a process has lost the device."""
        lost = [line for line in self._pieces_of_this_start() if "lost_at" in line]
        return [line["lost_at"] for line in lost if name in (None, line["name"])]

    def _pieces_of_this_start(self) -> list[dict[str, Any]]:
        last = max((i for i, line in enumerate(self.seen) if line["kind"] == "start"), default=0)
        return [line for line in self.seen[last:] if line["kind"] == "piece"]


def drop_half_a_line(folder: Path) -> None:
    """Cut off what a process that was killed while writing left at the end of the file."""
    end_with_a_whole_line(folder / FILE)

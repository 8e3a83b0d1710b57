"""What every refusal on the command line has in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decoder.__main__ import main


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(arguments: list[str], named: str, folder: Path, capsys: Any, code: int = 2) -> str:
    """One line on stderr that names what is wrong, an exit code, and ``folder`` as it was."""
    before = contents(folder)
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    (line,) = captured.err.strip("\n").split("\n")
    assert line.isprintable() and len(line) < 700
    assert "Traceback" not in line
    assert named in line, f"expected {named!r} to be named, got {line!r}"
    assert captured.out == ""
    assert contents(folder) == before
    return line

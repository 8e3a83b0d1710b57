"""Prompt files: one JSON object per line, never a whole file in memory."""

from __future__ import annotations

import gzip
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from decoder.errors import UserError, explained
from decoder.requests.reader import NotYet

from .prompt_lines import BadLine, checked, parse_line

STDIN = "-"
_BOM = b"\xef\xbb\xbf"
_LONGEST_LINE = 2**26  # bytes
_READ = 2**16  # of them at a time, from a stream


def read_prompts(path: str | Path) -> Iterator[dict[str, Any] | BadLine]:
    """Yield the prompts of a JSONL file (``.gz`` too, ``-`` is standard input).

    Every line holds ``"prompt"``, ``"token_ids"`` or ``"messages"`` (a chat), optionally ``"id"``
    (or ``"task_id"``), ``"metadata"`` and sampling parameters of its own. Of MT-bench's
    ``"turns"`` the first is the prompt; other fields of well-known data sets are ignored. A line
    that is none of this takes its number, too.

    Raises:
        UserError: the file cannot be read, or not to its end.
    """
    arriving = arriving_prompts(path, lambda: True)
    return (prompt for prompt in arriving if not isinstance(prompt, NotYet))


def arriving_prompts(
    path: str | Path, may_wait: Callable[[], bool]
) -> Iterator[dict[str, Any] | BadLine | NotYet]:
    """``read_prompts``; of a stream, ``NotYet`` where the next is to come and none ``may_wait``."""
    index = number = 0
    source = "standard input" if str(path) == STDIN else str(path)
    with explained(f"cannot read prompts from {source}"):
        for line in _lines(path, may_wait):
            if isinstance(line, NotYet):
                yield line
                continue
            number += 1
            if line.strip():
                yield parse_line(line, f"{source}:{number}", index)
                index += 1


def check_prompts(path: str | Path) -> int:
    """Parse the whole file once, so that a bad line stops a run before it starts.

    Returns:
        The number of prompts.

    Raises:
        UserError: file name, line number, and what is wrong there; also for a file without
            prompts.
    """
    count = sum(1 for prompt in read_prompts(path) if checked(prompt))
    if count == 0:
        raise UserError(f"{path}: expected at least one prompt, got none")
    return count


def is_stream(path: str | Path) -> bool:
    """Whether prompts come once and cannot be checked before: standard input, a shell's pipe."""
    return str(path) == STDIN or _is_unnamed_pipe(path)


def is_same_file(path: str | Path | int, other: str | Path | int) -> bool:
    """Whether two names, or a name and a descriptor, are one regular file, by whatever links."""
    try:
        first, second = os.stat(path), os.stat(other)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(first.st_mode) and os.path.samestat(first, second)


def descriptor_of(stream: Any) -> int | None:
    """Of a file or a standard stream, None where it is closed or a stand-in for one."""
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None


def _is_unnamed_pipe(path: str | Path) -> bool:
    """``<(...)`` of a shell: both ends are open, so that opening it does not wait for the other."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode) and not os.path.exists(os.path.realpath(path))
    except (OSError, ValueError):
        return False


def _lines(path: str | Path, may_wait: Callable[[], bool]) -> Iterator[bytes | NotYet]:
    with ExitStack() as stack:
        file: IO[Any]
        if str(path) == STDIN:
            if sys.stdin is None:
                raise UserError("cannot read prompts from standard input: it is closed")
            file = getattr(sys.stdin, "buffer", sys.stdin)
        else:
            file = stack.enter_context(_opened(path))
        first = True
        lines: Iterator[Any] = iter(lambda: file.readline(_LONGEST_LINE) or None, None)
        if is_stream(path) and (descriptor := descriptor_of(file)) is not None:
            lines = _arriving(descriptor, may_wait)
        for line in lines:
            if isinstance(line, NotYet):
                yield line
                continue
            if isinstance(line, str):  # an interpreter's own stand-in for standard input
                line = line.encode(errors="surrogatepass")
            if len(line) >= _LONGEST_LINE:
                raise UserError(f"{path}: expected lines below {_LONGEST_LINE >> 20} MiB, got more")
            yield line.removeprefix(_BOM) if first else line
            first = False


def _arriving(descriptor: int, may_wait: Callable[[], bool]) -> Iterator[bytes | NotYet]:
    """The lines of a pipe or terminal as they come; one that is too long to its longest part."""
    parts: list[bytes] = []
    while True:
        if not may_wait() and not select.select([descriptor], [], [], 0)[0]:
            yield NotYet()
            continue
        read = os.read(descriptor, _READ)
        *whole, rest = (b"".join([*parts, read]) if b"\n" in read else read).split(b"\n")
        if whole:
            yield from (line + b"\n" for line in whole)
            parts = []
        parts.append(rest)
        if not read or sum(map(len, parts)) >= _LONGEST_LINE:
            yield b"".join(parts)
            return


def _opened(path: str | Path) -> IO[Any]:
    mode = os.stat(path).st_mode
    readable = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or _is_unnamed_pipe(path)
    if not readable:
        what = "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"
        raise UserError(
            f"cannot read prompts from {path}: expected a file, got {what}; "
            "standard input is --prompts -"
        )
    opener: Any = gzip.open if str(path).endswith(".gz") else open
    file: IO[Any] = opener(path, "rb")
    return file

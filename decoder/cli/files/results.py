"""Result files: one JSON object per line, on disk when its sequence ends.

A file is taken, looked at and locked before models are loaded, and changed only when decoding
begins. What is not ours is never overwritten.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from decoder.errors import UserError, explained, reason
from decoder.requests.outputs import Output

from .prompt_lines import LineId
from .prompts import descriptor_of, is_same_file

_START = re.compile(rb'\s*\{\s*"index"\s*:')  # what no other file begins with
_OPENINGS = 100  # of a file that others remove, before it is given up


class RunStopped(Exception):
    """A run that had begun cannot go on; what is finished is kept, and the message says where."""


class ResultWriter:
    """Writes outputs to a JSONL file or to standard output, a line at a time.

    Args:
        path: file, or ``None`` for standard output.
        resume: keep what is in the file and skip its prompts; otherwise it is overwritten.
        prompts: what the prompts are read from: a path or a descriptor, never the same file.

    Attributes:
        done: of the prompts that have a result, index to ``LineId``.

    Raises:
        UserError: the file cannot be written, is in use, or holds something else than results.
    """

    def __init__(
        self, path: str | Path | None, *, resume: bool = False, prompts: str | int | None = None
    ) -> None:
        self.done: dict[int, LineId] = {}
        self._path = None if path is None else Path(path)
        self._resume = resume
        self._fd: int | None = None
        self._created: Path | None = None
        self._end, self._lacks_newline, self._begun = 0, False, False
        if self._path is None:
            if resume:
                raise UserError("--resume needs --output, got none")
            _refuse_prompts(descriptor_of(sys.stdout), prompts, "standard output")
            return
        _refuse_prompts(self._path, prompts, f"--output {path}")
        with explained(f"cannot write to {path}"):
            self._open(self._path)
        try:
            self._look()
        except BaseException:
            self.close()
            raise

    def is_done(self, line_id: LineId) -> bool:
        """Whether a prompt has a result.

        Raises:
            UserError: there is one, but of another prompt.
        """
        found = self.done.get(line_id.index)
        if found is None:
            return False
        # Results of older versions carry no digest.
        same = found.digest is None or found.digest == line_id.digest
        if found.name != line_id.name or not same:
            raise UserError(
                f"{self._path}: expected the results of these prompts, got one of another prompt "
                f"{found!r} where they have {line_id!r}; --resume needs the same prompts"
            )
        return True

    def begin(self) -> None:
        """Make the file ready for the first result: emptied, or cut after the last whole line."""
        self._begun = True
        if self._fd is None or not _is_regular(self._fd):
            return
        with explained(f"cannot write to {self._path}"):
            os.ftruncate(self._fd, self._end)
            if self._lacks_newline:
                os.write(self._fd, b"\n")

    def write(self, output: Output) -> None:
        """Append one line; it is with the system when this returns.

        Raises:
            RunStopped: it could not be written.
            BrokenPipeError: nobody reads any more.
        """
        line = json.dumps(as_record(output), ensure_ascii=self._fd is None and _is_narrow()) + "\n"
        try:
            if self._fd is None:
                sys.stdout.write(line)
                sys.stdout.flush()
                return
            rest = memoryview(line.encode())
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            where = "standard output" if self._path is None else self._path
            hint = "" if self._path is None else "; --resume goes on after the results it has"
            raise RunStopped(f"cannot write to {where}: {reason(error)}{hint}") from error

    def close(self) -> None:
        """Close the file, and remove it if nothing was to be written; standard output stays."""
        if self._fd is None:
            return
        if self._created is not None and not self._begun:
            with suppress(OSError):
                os.unlink(self._created)
        os.close(self._fd)
        self._fd = None

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _open(self, path: Path) -> None:
        exists = path.exists()
        if exists and not path.is_file():
            if self._resume:
                raise UserError(f"--resume needs a file with results, got {path}")
            # Without waiting for one who reads a FIFO.
            self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(self._fd, True)
            return
        for _ in range(_OPENINGS):
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._created = None if exists else path.resolve()
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._fd)
                self._fd = None
                raise UserError(f"cannot write to {path}: another run writes to it") from None
            except OSError:
                pass  # a file system without locks
            if is_same_file(self._fd, path):
                return
            # The run that had made the file removed it before it was locked here.
            os.close(self._fd)
            self._fd, exists = None, path.exists()
        raise UserError(f"cannot write to {path}: it is removed as soon as it is opened")

    def _look(self) -> None:
        """Refuse a file of somebody else; with ``resume``, find what is done and where it ends."""
        if self._fd is None or not _is_regular(self._fd):
            return
        for line, record in _records(self._fd):
            if self._end == 0 and record is None and (line.endswith(b"\n") or not _is_torn(line)):
                raise UserError(
                    f"{self._path} holds something else than results and is not overwritten; "
                    "expected a new or empty file, or one that generate wrote"
                )
            if not self._resume:
                return
            if record is None and not line.endswith(b"\n"):
                return  # the line that was being written when the run ended
            self._end += len(line)
            self._lacks_newline = not line.endswith(b"\n")
            if record is not None:
                index = record["index"]
                self.done[index] = LineId(index, record.get("id"), record.get("digest"))


def as_record(output: Output) -> dict[str, Any]:
    """An output as plain values: what it is of, then its tokens, or why there are none."""
    line_id = output.id if isinstance(output.id, LineId) else LineId(output.index, output.id)
    record: dict[str, Any] = {"index": line_id.index}
    for name, value in (
        ("id", line_id.name),
        ("digest", line_id.digest),
        ("metadata", line_id.metadata),
    ):
        if value is not None:
            record[name] = value
    if output.error is not None:
        return {**record, "error": output.error}
    stats = output.stats
    record |= {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stats": {
            "prompt_tokens": stats.prompt_tokens,
            "new_tokens": len(output.token_ids),
            "rounds": stats.rounds,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
        },
    }
    if output.seed is not None:
        record["seed"] = output.seed
    if output.logprobs is not None:
        record["logprobs"] = [entry._asdict() for entry in output.logprobs]
    return record


def _records(descriptor: int) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a result file, each with the record that it is, if it is one."""
    with open(descriptor, "rb", closefd=False) as file:
        start = file.peek(64)[:64]
        if start and not _is_torn(start):
            yield start, None  # whatever it is, it need not be read whole
            return
        for line in file:
            yield line, _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and type(record.get("index")) is int:
            return record if "finish_reason" in record or "error" in record else None
    return None


def _is_torn(line: bytes) -> bool:
    """Whether this is how a result begins, if only its first few characters."""
    return _START.match(line) is not None or b'{"index":'.startswith(line)


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _is_narrow() -> bool:
    """Whether standard output cannot take every character."""
    return str(getattr(sys.stdout, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8")


def _refuse_prompts(output: Path | int | None, prompts: str | int | None, what: str) -> None:
    if output is not None and prompts is not None and is_same_file(output, prompts):
        raise UserError(f"expected results elsewhere than the prompts, got {what} for both")

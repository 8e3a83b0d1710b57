"""Prompt files in, result files out: one JSON object per line, never a whole file in memory.

A result line is flushed when its sequence finishes, so an interrupted run keeps every finished one
and ``resume`` continues after them.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from decoder.errors import UserError
from decoder.requests.outputs import Output
from decoder.requests.params import SamplingParams

_PARAMETERS = frozenset(field.name for field in fields(SamplingParams))
_KNOWN = _PARAMETERS | {"prompt", "token_ids", "id", "task_id"}


@dataclass(frozen=True, slots=True)
class LineId:
    """What identifies a prompt: its number, counted from 0, and the name its line gives it."""

    index: int
    name: Any

    def __repr__(self) -> str:
        return f"{self.index + 1}" if self.name is None else f"{self.index + 1} ({self.name})"

    @property
    def key(self) -> str:
        """Stable across runs of the same file; what ``resume`` compares."""
        return json.dumps(self.index if self.name is None else self.name)


def read_prompts(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the prompts of a JSONL file (``.gz`` too, ``-`` is standard input).

    Every line holds ``"prompt"`` or ``"token_ids"``, optionally ``"id"`` (or ``"task_id"``) and
    sampling parameters of its own. Other fields, which data sets carry, are ignored.

    Raises:
        UserError: file name, line number, and what is wrong there.
    """
    index = 0
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _parse(line, f"{path}:{number}", index)
            index += 1


def check_prompts(path: str | Path) -> int:
    """Parse the whole file once, so that a bad line stops a run before it starts.

    Returns:
        The number of prompts.

    Raises:
        UserError: as ``read_prompts``; also for a file without prompts.
    """
    count = sum(1 for _ in read_prompts(path))
    if count == 0:
        raise UserError(f"{path}: expected at least one prompt, got none")
    return count


def _lines(path: str | Path) -> Iterator[str]:
    if str(path) == "-":
        yield from sys.stdin
        return
    try:
        opener: Any = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as file:
            yield from file
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"cannot read prompts from {path}: {reason}") from None


def _parse(line: str, source: str, index: int) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{source}: expected a JSON object, got {line.strip()[:40]!r} ({error})"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"{source}: expected a JSON object, got {type(fields).__name__}")
    text, ids = fields.get("prompt"), fields.get("token_ids")
    if (text is None) == (ids is None):
        raise UserError(f'{source}: expected exactly one of "prompt" and "token_ids"')
    if text is not None and not isinstance(text, str):
        raise UserError(f'{source}: "prompt" must be text, got {type(text).__name__}')
    if ids is not None and not _is_token_list(ids):
        raise UserError(f'{source}: "token_ids" must be a list of integers')
    prompt = {name: value for name, value in fields.items() if name in _KNOWN and value is not None}
    name = prompt.pop("task_id", None)
    parameters = {key: value for key, value in prompt.items() if key in _PARAMETERS}
    try:
        SamplingParams().updated(parameters)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: {error}") from None
    return {**prompt, "id": LineId(index, prompt.get("id", name))}


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


class ResultWriter:
    """Writes outputs to a JSONL file or to standard output, a line at a time.

    Args:
        path: file, or ``None`` for standard output.
        resume: keep what is in the file and skip its prompts; otherwise it is overwritten.
    """

    def __init__(self, path: str | Path | None, *, resume: bool = False) -> None:
        if resume and path is None:
            raise UserError("--resume needs --output, got none")
        self.done: set[str] = set()
        self._owned = path is not None
        if path is None:
            self._file: IO[str] = sys.stdout
            return
        try:
            if resume and Path(path).exists():
                self.done = _drop_partial_line(Path(path))
            self._file = open(path, "a" if resume else "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}") from None

    def pending(self, prompts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The prompts that have no result yet."""
        return (prompt for prompt in prompts if prompt["id"].key not in self.done)

    def write(self, output: Output) -> None:
        """Append one line and flush it."""
        self._file.write(json.dumps(as_record(output), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; standard output stays open."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def as_record(output: Output) -> dict[str, Any]:
    """An output as plain values."""
    name: Any = output.id
    index = output.index
    if isinstance(name, LineId):
        index, name = name.index, name.name
    stats = output.stats
    record: dict[str, Any] = {"index": index}
    if name is not None:
        record["id"] = name
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
    if output.logprobs is not None:
        record["logprobs"] = [entry._asdict() for entry in output.logprobs]
    return record


def _drop_partial_line(path: Path) -> set[str]:
    """Keys of the finished lines of ``path``; cuts off a last line that was not finished."""
    done: set[str] = set()
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            with suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                done.add(LineId(record["index"], record.get("id")).key)
    with path.open("rb+") as file:
        file.truncate(end)
    return done

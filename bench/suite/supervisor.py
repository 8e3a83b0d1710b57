"""Keeps a worker going: replaces one that hangs or dies, and ends with the time.

A kernel that reads outside its memory poisons its process, and one that never ends cannot be
interrupted from within; so pieces run in a worker, and this process, which never touches the
device, only reads the lines the worker writes.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from bench.suite.progress import FILE, Lines, Tail, drop_half_a_line

# The exit code of a worker that asks to be replaced: its device is lost to it.
RESTART = 75
POLL_S = 0.2
# Time kept at the end for the table.
CLOSING_S = 5.0


def supervise(
    command: Callable[[float], list[str]], folder: Path, minutes: float, **told: Any
) -> dict[str, str]:
    """Run workers until the pieces are through or the minutes are.

    Args:
        command: seconds a worker may take -> how to start it.
        folder: of the lines, and of the log that takes what workers print.
        told: fields of the ``start`` line.

    Returns:
        What went wrong in this start: piece -> reason.
    """
    end = time.monotonic() + 60.0 * minutes - CLOSING_S
    drop_half_a_line(folder)
    Lines(folder).write("start", minutes=minutes, **told)
    trouble: dict[str, str] = {}
    with (folder / "suite.log").open("a") as log:
        while not trouble and time.monotonic() < end:
            outcome = _watch(command(end - time.monotonic()), folder, log, end)
            drop_half_a_line(folder)
            if outcome is None:
                break
            trouble = _blame(Lines(folder), outcome)
    states = Lines(folder).states_of_this_start()
    return trouble | {n: line["reason"] for n, line in states.items() if line["state"] == "failed"}


def _watch(command: list[str], folder: Path, log: IO[str], end: float) -> str | None:
    """Run a worker; kill it when a piece hangs or time is up. Why it was lost, or None."""
    tail = Tail(folder / FILE)
    tail.new()
    limit = float("inf")
    worker = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        while True:
            ended = worker.poll() is not None  # asked first, so that its last lines are seen
            for line in tail.new():
                if line["kind"] == "piece":
                    _say(line)
                    hard = line.get("hard_s", float("inf"))
                    limit = time.monotonic() + hard
            if ended:
                break
            if time.monotonic() > end:
                return None  # what was found is in the lines
            if time.monotonic() > limit:
                return f"hung: had not ended after {hard:.0f} s"
            time.sleep(POLL_S)
    finally:
        worker.kill()
        worker.wait()
    return None if worker.returncode == 0 else f"its process ended with code {worker.returncode}"


def _blame(lines: Lines, outcome: str) -> dict[str, str]:
    """Write down which piece lost the worker; trouble when none did, and another would, too."""
    states = lines.states_of_this_start()
    running = [name for name, line in states.items() if line["state"] == "begun"]
    if running:
        lines.write("piece", name=running[-1], state="failed", reason=outcome)
    elif not outcome.endswith(f"code {RESTART}"):
        return {"worker": outcome}
    return {}


def _say(line: dict[str, Any]) -> None:
    if line["state"] != "begun":
        took = f" in {line['took_s']} s" if "took_s" in line else ""
        why = f": {line['reason']}" if "reason" in line else ""
        print(f"{line['name']}: {line['state']}{took}{why}", flush=True)

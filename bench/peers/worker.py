"""A peer that must live in another virtual environment: one JSON line to it, one back.

This module is imported on both sides, so it uses the standard library only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

Message = dict[str, Any]
SETTLE_S = (
    0.3  # a peer's OpenMP threads spin for up to 200 ms after a call; do not time beside them
)


class Worker:
    """The parent's side."""

    def __init__(
        self, command: list[str], threads: int, variables: Mapping[str, str] | None = None
    ) -> None:
        self.name = " ".join(command)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(variables or {})
        # Looked at only when the worker dies; closed with it.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def ask(self, **message: Any) -> Message:
        """Send one message and wait for its answer.

        Raises:
            RuntimeError: the worker answered with an error, or ended.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith('{"answer"'):  # the peer may log to stdout, too
                    answer = json.loads(line)["answer"]
                    if "error" in answer:
                        raise RuntimeError(f"{self.name}: {answer['error']}")
                    time.sleep(SETTLE_S)
                    return answer
        except BrokenPipeError:
            pass
        code = self.process.wait()
        self._log.seek(0)
        last = self._log.read().strip().rpartition("\n")[2]
        raise RuntimeError(f"{self.name} ended with exit code {code}: {last}")

    def close(self) -> None:
        """End the worker by closing its input."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._log.close()


def serve(answer: Callable[[Message], Message]) -> None:
    """The worker's side: answer every line of standard input until it closes."""
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # the parent must learn of it, whatever it is
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"answer": reply}), flush=True)

"""llama.cpp as a peer: ``llama-batched-bench`` on a GGUF file, plain batched decoding.

Its program draws random tokens, reads prompts of one length and feeds each sequence tokens drawn
anew instead of its own: the cost of decoding, without sampling and without text. So there is no
output to compare. Each call is a process of its own that does everything twice; the second pass is
the one that counts, when weights are in memory and threads are running.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = "llama-batched-bench"
CELLS = 256  # a sequence's share of the cache is a multiple of this
# The run: its prompt and new tokens, sequences and threads; and what was measured.
ASKED = ("pp", "tg", "pl", "n_threads", "n_threads_batch")
TIMES = ("t_pp", "t_tg")


class LlamaCpp:
    """``llama-batched-bench`` on one file."""

    def __init__(self, folder: Path, file: Path, threads: int) -> None:
        """Look at both; nothing is measured yet.

        Args:
            folder: of llama.cpp's programs (``bench/peers/README.md`` says how to build them).
            file: the model.
            threads: for prompts and for decoding.

        Raises:
            FileNotFoundError: no such program or file.
            RuntimeError: the program does not run.
        """
        for path in (folder / PROGRAM, file):
            if not path.is_file():
                raise FileNotFoundError(f"llama.cpp needs {path}, which is not there")
        self._program, self._file, self._threads = folder / PROGRAM, file, threads
        said = self._output("--version")
        version = re.search(r"^version: (.+)$", said, re.MULTILINE)
        if version is None:
            raise RuntimeError(f"{PROGRAM} --version must name its version, got {said.strip()!r}")
        self.version = version[1]

    def run(self, prompts: list[list[int]], max_new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds of reading as many prompts of their mean length and of decoding; no tokens.

        A prompt's last position gives the first new token, as it does for us: what is left are
        ``max_new_tokens - 1`` steps.

        Raises:
            ValueError: fewer than two new tokens, which leave nothing to decode.
            RuntimeError: the program failed, or printed something else than was asked for.
        """
        if max_new_tokens < 2:
            raise ValueError(f"{PROGRAM} needs at least 2 new tokens, got {max_new_tokens}")
        batch, length, steps = len(prompts), mean_length(prompts), max_new_tokens - 1
        cells = batch * -(-(length + steps) // CELLS) * CELLS
        said = self._output(
            *("-m", self._file, "-c", cells, "--output-format", "jsonl"),
            *("-npp", length, "-ntg", steps, "-npl", f"{batch},{batch}"),
            *("-t", self._threads, "-tb", self._threads),
        )
        asked = (length, steps, batch, self._threads, self._threads)
        return self._seconds(said, dict(zip(ASKED, asked, strict=True))), []

    def _seconds(self, said: str, asked: dict[str, int]) -> float:
        """Seconds of the last pass, of what was asked for alone."""
        lines: list[dict[str, Any]] = [
            json.loads(line) for line in said.splitlines() if line.startswith("{")
        ]
        if len(lines) != 2 or any(line.get(key) != asked[key] for line in lines for key in ASKED):
            got = [{key: line.get(key) for key in ASKED} for line in lines]
            raise RuntimeError(f"llama.cpp {self.version} must print {asked} twice, got {got}")
        return sum(lines[-1][key] for key in TIMES)

    def _output(self, *arguments: Any) -> str:
        done = subprocess.run(
            [str(self._program), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(self._threads)},
        )
        if done.returncode:
            last = done.stdout.strip().rpartition("\n")[2]
            raise RuntimeError(f"{PROGRAM} ended with exit code {done.returncode}: {last}")
        return done.stdout


def mean_length(prompts: list[list[int]]) -> int:
    """Tokens of a prompt, on average."""
    return round(sum(map(len, prompts)) / len(prompts))

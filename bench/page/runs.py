"""Which lines were measured together: a folder may hold several runs, and none are mixed."""

from __future__ import annotations

from collections import defaultdict
from itertools import takewhile

from bench.pictures.style import Lines


def runs_of(lines: Lines) -> list[Lines]:
    """Lines of one commit, environment and sub-command each, in the order of their first lines."""
    runs: dict[tuple[str, str], Lines] = defaultdict(list)
    for line in lines:
        words = line["env"]["command"].split()
        variables = len(list(takewhile(lambda word: "=" in word, words)))
        runs[line["env"]["commit"], " ".join(words[: variables + 4])].append(line)
    return list(runs.values())


def largest_run(lines: Lines) -> Lines:
    """The run with most lines, the first of equals; empty without lines."""
    return max(runs_of(lines), key=len, default=[])

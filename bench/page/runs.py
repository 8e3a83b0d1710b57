"""Which lines were measured together: a folder may hold several runs, and none are mixed."""

from __future__ import annotations

from collections import defaultdict

from bench.pictures.style import Lines


def runs_of(lines: Lines) -> list[Lines]:
    """Lines of one commit and sub-command each, in the order of their first lines."""
    runs: dict[tuple[str, str], Lines] = defaultdict(list)
    for line in lines:
        words = line["env"]["command"].split()
        runs[line["env"]["commit"], " ".join(words[:4])].append(line)
    return list(runs.values())


def largest_run(lines: Lines) -> Lines:
    """The run with most lines, the first of equals; empty without lines."""
    return max(runs_of(lines), key=len, default=[])

"""How ragged prompts are cut into forwards."""

from __future__ import annotations

from collections.abc import Iterator

PREFILL_CHUNK = 256  # positions per forward
_PREFILL_TOKENS = 4096  # rows * positions per forward
_PREFILL_OVERHEAD = 64  # tokens whose time a further forward costs


def prefill_parts(lengths: list[int]) -> list[tuple[int, int]]:
    """Where to cut prompts, longest first, so that padding and forwards together cost least."""
    best: list[tuple[int, int]] = [(0, 0)]  # tokens paid for the first n prompts, last part's start
    for end in range(1, len(lengths) + 1):
        options = []
        for start in range(end - 1, -1, -1):
            rows = end - start
            if rows > 1 and rows * min(PREFILL_CHUNK, lengths[start]) > _PREFILL_TOKENS:
                break
            options.append((best[start][0] + _PREFILL_OVERHEAD + rows * lengths[start], start))
        best.append(min(options))
    parts, end = [], len(lengths)
    while end:
        parts.append((best[end][1], end))
        end = best[end][1]
    return parts[::-1]


def prefill_chunks(lengths: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Forwards that read prompts, longest first: rows from, to, and positions from, to."""
    for first, end in prefill_parts(lengths):
        for start in range(0, lengths[first], PREFILL_CHUNK):
            live = sum(length > start for length in lengths[first:end])
            yield first, first + live, start, min(start + PREFILL_CHUNK, lengths[first])

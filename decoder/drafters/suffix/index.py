"""Where the last tokens of a text occurred before, in any of several growing texts.

Hash chains, as in LZ77 compressors: a table has the latest place of each short run of tokens, and
each place has the one before it. A token is added in constant time and costs a few words; longer
matches are found by comparing backwards from the places of a run. A text is forgotten as a whole:
chains that lead into it end there, so there is nothing to clear. Integers and arrays, no tensors: a
lookup is a few dozen steps.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import NamedTuple

RUNS = (4, 1)  # tokens per run, longest first
MOST_PLACES = 8  # of a run that a lookup takes into account, the latest
_MOST_STEPS = 32  # of a chain, those to other texts and to other runs of the same hash included
_OFFSET_BITS = 32  # a place in a chain is a text's number and an offset in it
_OFFSET = (1 << _OFFSET_BITS) - 1


class Place(NamedTuple):
    """What follows an occurrence of the tokens looked up.

    Attributes:
        tokens: of the text that it is in.
        end: where the occurrence ends, ``0 < end < len(tokens)``.
    """

    tokens: array[int]
    end: int


class SuffixIndex:
    """Texts of token ids that grow at their ends.

    Args:
        table: entries in a table of runs, a power of two; more make lookups quicker.
        max_tokens: in closed texts together; beyond it the first closed is forgotten.
        max_texts: closed ones, likewise.
    """

    def __init__(self, table: int, max_tokens: int = 0, max_texts: int = 0) -> None:
        self._mask = table - 1
        self._latest = [array("q", [-1]) * table for _ in RUNS]
        self._texts: dict[int, tuple[array[int], array[int]]] = {}
        self._closed: deque[int] = deque()
        self._opened = self._closed_tokens = 0
        self._max_tokens, self._max_texts = max_tokens, max_texts

    def open(self) -> int:
        """Start a text; returns its number."""
        number, self._opened = self._opened, self._opened + 1
        # Beside each token, for each length of run, the place before it of the run that it ends.
        self._texts[number] = array("i"), array("q")
        return number

    def tokens(self, number: int) -> array[int]:
        """The text's tokens, an array that grows with it."""
        return self._texts[number][0]

    def extend(self, number: int, new: list[int]) -> None:
        """Add tokens to a text that is open."""
        tokens, older = self._texts[number]
        known = tokens[-RUNS[0] :]
        window, base = [*known, *new], number << _OFFSET_BITS
        for at in range(len(known) + 1, len(window) + 1):
            ended = [
                (latest, hash(tuple(window[at - run : at])) & self._mask)
                for latest, run in zip(self._latest, RUNS, strict=True)
                if at >= run
            ]
            before = [latest[entry] for latest, entry in ended]
            # In this order an interrupt leaves no place that does not exist.
            older.extend([-1] * (len(RUNS) - len(before)) + before)
            tokens.append(window[at - 1])
            for latest, entry in ended:
                latest[entry] = base | len(tokens)

    def close(self, number: int) -> None:
        """End a text. It stays until those closed after it need its room."""
        self._closed.append(number)
        self._closed_tokens += len(self._texts[number][0])
        self._keep(self._max_tokens, self._max_texts)

    def forget_closed(self) -> None:
        """Forget every text that has been closed."""
        self._keep(0, 0)

    def _keep(self, max_tokens: int, max_texts: int) -> None:
        while self._closed_tokens > max_tokens or len(self._closed) > max_texts:
            tokens, _ = self._texts.pop(self._closed.popleft())
            self._closed_tokens -= len(tokens)

    def find(self, recent: array[int], besides: int = -1) -> list[Place]:
        """The latest places where the longest run that ``recent`` ends with occurred, newest first.

        Args:
            recent: the last tokens of a text.
            besides: number of a text not to look in.
        """
        for level, run in enumerate(RUNS):
            if len(recent) >= run and (found := self._places(level, recent[-run:], besides)):
                return found
        return []

    def _places(self, level: int, run: array[int], besides: int) -> list[Place]:
        found: list[Place] = []
        place = self._latest[level][hash(tuple(run)) & self._mask]
        for _ in range(_MOST_STEPS):
            number, end = place >> _OFFSET_BITS, place & _OFFSET
            text = self._texts.get(number)
            if text is None:
                break
            tokens, older = text
            follows = end < len(tokens) and number != besides
            if follows and tokens[end - len(run) : end] == run:
                found.append(Place(tokens, end))
                if len(found) == MOST_PLACES:
                    break
            place = older[(end - 1) * len(RUNS) + level]
        return found

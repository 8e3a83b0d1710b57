"""The index against a search of everything it was told, and what it forgets."""

from __future__ import annotations

import random
from array import array

import pytest

from decoder.drafters.suffix import index as module
from decoder.drafters.suffix.index import MOST_PLACES, RUNS, SuffixIndex


class Searched:
    """Keeps every text and searches all of it."""

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}
        self.added: list[tuple[int, int]] = []  # number and end, in order

    def extend(self, number: int, new: list[int]) -> None:
        for token in new:
            self.texts.setdefault(number, []).append(token)
            self.added.append((number, len(self.texts[number])))

    def find(self, recent: list[int], besides: int) -> list[tuple[list[int], int]]:
        for run in RUNS:
            found = [
                (self.texts[number], end)
                for number, end in reversed(self.added)
                if number in self.texts and number != besides and len(recent) >= run <= end
                if self.texts[number][end - run : end] == recent[-run:]
                if end < len(self.texts[number])
            ]
            if found:
                return found[:MOST_PLACES]
        return []


@pytest.mark.parametrize("seed", range(30))
def test_finds_what_a_search_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where runs share an entry of the table, given the steps."""
    monkeypatch.setattr(module, "_MOST_STEPS", 10**6)
    rng = random.Random(seed)
    index, searched = SuffixIndex(rng.choice([1, 8, 1 << 10]), 0, 0), Searched()
    numbers = [index.open() for _ in range(3)]
    for _ in range(40):
        number = rng.choice(numbers)
        new = [rng.randrange(rng.choice([2, 4])) for _ in range(rng.randrange(5))]
        index.extend(number, new)
        searched.extend(number, new)
        own = list(index.tokens(number))
        assert own == searched.texts.get(number, [])
        besides, recent = rng.choice([-1, *numbers]), own[-rng.randrange(1, 9) :]
        found = [(list(p.tokens), p.end) for p in index.find(array("i", recent), besides)]
        assert found == searched.find(recent, besides)


def test_a_lookup_takes_a_bounded_number_of_steps() -> None:
    index = SuffixIndex(1 << 10)
    hidden, crowd = index.open(), index.open()
    index.extend(hidden, [7, 8])
    index.extend(crowd, [7] * 200)
    assert len(index.find(array("i", [7]))) == MOST_PLACES
    assert index.find(array("i", [7]), besides=crowd) == []


def test_the_first_closed_text_makes_room() -> None:
    index = SuffixIndex(1 << 10, max_tokens=10, max_texts=3)
    numbers = [index.open() for _ in range(6)]
    for number in numbers:
        index.extend(number, [number, 50 + number, 60 + number, 9])
    known = lambda: [n for n in numbers if index.find(array("i", [n]))]
    assert known() == numbers
    for number in (2, 0):
        index.close(number)
    assert known() == numbers
    index.close(5)
    assert known() == [0, 1, 3, 4, 5]  # eight tokens are left of twelve
    index.extend(1, [9])
    assert index.find(array("i", [61]))[0].tokens == array("i", [1, 51, 61, 9, 9])
    # The first text's own 9 is behind that of the text forgotten, where the chain ends.
    assert index.find(array("i", [9])) == []
    index.close(1)
    index.close(3)
    assert known() == [1, 3, 4] and sum(len(t) for t, _ in index._texts.values()) == 13


def test_closed_texts_are_counted_too() -> None:
    index = SuffixIndex(1 << 10, max_tokens=10**6, max_texts=2)
    for number in range(5):
        index.open()
        index.extend(number, [number, 9])
        index.close(number)
    assert [bool(index.find(array("i", [n]))) for n in range(5)] == [False] * 3 + [True] * 2

"""The longest match, and the path on which most of its places agree."""

from __future__ import annotations

from array import array

import pytest

from decoder.drafters.suffix.continuation import likeliest, longest
from decoder.drafters.suffix.index import Place


def place(text: list[int], end: int) -> Place:
    return Place(array("i", text), end)


def test_longest() -> None:
    recent = array("i", [1, 2, 3, 4])
    places = [
        place([4, 9], 1),
        place([2, 3, 4, 9], 3),
        place([7, 2, 3, 4, 9], 4),
        place([9, 9, 3, 4, 9], 4),
    ]
    assert longest(places, recent) == (3, [places[1], places[2]])
    whole = place([0, 1, 2, 3, 4, 9], 5)
    assert longest([*places, whole], recent) == (4, [whole])
    assert longest([place([1, 2, 3, 4, 9], 4)], recent[-2:])[0] == 2
    assert longest([], recent) == (0, [])


OWN = array("i", [0])
FORKS = [[5, 1, 2, 3], [5, 1, 2, 4], [5, 1, 6], [5, 7]]


@pytest.mark.parametrize(
    ("count", "min_prob", "expected"),
    [
        (0, 0.0, []),
        (1, 0.0, [1]),
        (9, 0.0, [1, 2, 3]),  # the first of those that tie
        (9, 0.5, [1, 2]),  # 3/4, 2/3 of that, 1/2 of that
        (9, 0.51, [1]),
        (9, 0.76, []),
    ],
)
def test_likeliest(count: int, min_prob: float, expected: list[int]) -> None:
    places = [place(fork, 1) for fork in FORKS]
    assert likeliest(places, OWN, count, min_prob) == expected


def test_a_place_that_has_ended_says_nothing() -> None:
    assert likeliest([place([5, 1], 1), place([5, 1, 2], 1)], OWN, 4, 0.9) == [1, 2]


def test_the_own_text_runs_on_into_the_path() -> None:
    own = array("i", [9, 1, 2, 1, 2])
    assert likeliest([Place(own, 3)], own, 5, 0.1) == [1, 2, 1, 2, 1]
    assert likeliest([Place(array("i", own), 3)], own, 5, 0.1) == [1, 2]

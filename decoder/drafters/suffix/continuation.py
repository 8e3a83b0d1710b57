"""What followed the longest match most often."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from .index import Place


def longest(places: Sequence[Place], recent: array[int]) -> tuple[int, list[Place]]:
    """How many of the ``recent`` tokens stand before a place at most, and the places where so many.

    Args:
        places: occurrences of some of the last of ``recent``.
        recent: tokens that are compared, all of them at most.
    """
    lengths = [_matched(place, recent) for place in places]
    most = max(lengths, default=0)
    return most, [place for place, n in zip(places, lengths, strict=True) if n == most]


def _matched(place: Place, recent: array[int]) -> int:
    tokens, end = place
    limit = min(len(recent), end)
    if tokens[end - limit : end] == recent[-limit:]:
        return limit
    n = 1
    while tokens[end - n] == recent[-n]:
        n += 1
    return n - 1


def likeliest(places: Sequence[Place], own: array[int], count: int, min_prob: float) -> list[int]:
    """The tokens that most of the places agree on, one after another.

    Each token is the most frequent of those that follow where all tokens before it did, the first
    of ``places`` on ties. A place in ``own`` runs on into the path itself, as LZ77 does: a text
    that repeats itself continues for ever.

    Args:
        places: that are counted.
        own: the text that the path continues.
        count: longest path.
        min_prob: the path ends before its product of frequencies falls below this.
    """
    path: list[int] = []
    prob = 1.0
    while len(path) < count:
        following: dict[int, list[Place]] = {}
        for place in places:
            tokens, at = place.tokens, place.end + len(path)
            if at < len(tokens):
                following.setdefault(tokens[at], []).append(place)
            elif tokens is own:
                following.setdefault(path[at - len(own)], []).append(place)
        if not following:
            break
        token = max(following, key=lambda token: len(following[token]))
        prob *= len(following[token]) / sum(map(len, following.values()))
        if prob < min_prob:
            break
        places = following[token]
        path.append(token)
    return path

"""A store's rules as numbers: how many experts it has room for, and how many it brings ahead.

The forecasts of ``decoder.perf_model.offload`` follow the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence

from decoder.errors import UserError

WORTH = 0.9  # share of hints that must come true for any to be acted on
_AHEAD = 4  # prefetching may use one of so many places


def places_within(budget: int, counts: Sequence[int], sizes: Sequence[int]) -> int:
    """Most experts at once in ``budget`` bytes.

    Args:
        counts: experts of each layer that has any.
        sizes: bytes of one of these, by layer.

    Raises:
        UserError: a budget below one layer's experts.
    """
    most, largest = max(counts), max(sizes)
    if budget < most * largest:
        raise UserError(
            f"the budget for experts must be at least {_gigabytes(most * largest)}, one layer's "
            f"{most} of {_gigabytes(largest)}, got {_gigabytes(budget)}"
        )
    return min(budget // largest, sum(counts))


def room_ahead(places: int, running: float) -> int:
    """Most experts that are brought for the next layer while one computes with ``running``."""
    return int(min(places // _AHEAD, places - running))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"

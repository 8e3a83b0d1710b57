"""The busiest rank: a layer waits for it, so its load counts and not the mean.

Experts lie on ranks in equal blocks and are equally popular; loads of single ranks are taken as
independent counts, binomial for experts and Poisson for rows. The exact urns (ranks share a fixed
sum) have the same expected maximum within 2 %, as a test shows by drawing from them. Experts that
are popular in every sequence would make the busiest rank busier than this.

Source: ``E[max] = sum over x >= 0 of 1 - F(x) ** N`` of N independent counts; balls in bins as
independent Poisson counts, Mitzenmacher and Upfal, "Probability and Computing" (2005), section 5.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_STEPS = 200  # in which a wide distribution is summed


def busiest_active(active: float, num_experts: int, ranks: int) -> float:
    """Expected distinct experts to read on the rank with most of them.

    Args:
        active: distinct experts that are touched anywhere, on average.
    """
    from scipy.special import bdtr

    held = math.ceil(num_experts / ranks)
    share = min(active / num_experts, 1.0)
    mean, deviation = held * share, math.sqrt(held * share * (1.0 - share))
    most = _expected_maximum(
        lambda x: bdtr(np.minimum(x, held), held, share), mean, deviation, ranks
    )
    return min(max(most, active / ranks, 1.0), held, active)


def busiest_rows(rows: float, alike: float, ranks: int) -> float:
    """Expected rows to multiply with experts on the rank that receives most of them.

    Args:
        rows: tokens times experts per token.
        alike: rows that go to one place together, 1 where tokens are routed independently: those
            that tokens of one sequence send to an expert they share.
    """
    from scipy.special import pdtr

    mean = rows / alike / ranks
    most = alike * _expected_maximum(lambda x: pdtr(x, mean), mean, math.sqrt(mean), ranks)
    return min(max(most, rows / ranks, 1.0), rows)


def _expected_maximum(
    cdf: Callable[[npt.NDArray[Any]], npt.NDArray[Any]],
    mean: float,
    deviation: float,
    ranks: int,
) -> float:
    low = max(0, math.floor(mean - 10 * deviation))
    high = math.ceil(mean + 10 * deviation) + 20
    step = max(1, (high - low) // _STEPS)
    x = np.arange(low, high, step) + (step - 1) / 2  # the middle of a step stands for all of it
    return low + step * float(np.sum(1.0 - cdf(x) ** ranks))

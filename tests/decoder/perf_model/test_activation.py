"""Distinct experts of tokens, independent and correlated."""

import numpy as np
import pytest

from decoder.perf_model.activation import CorrelatedActivation, IidActivation
from decoder.perf_model.theory import active_experts, effective_tokens

GRID = [(b, q) for b in (1, 2, 4, 8, 16) for q in (1, 2, 3, 5, 9)]


def test_iid_is_equation_8() -> None:
    assert IidActivation()(3, 4, 64, 8) == active_experts(12, 64, 8)


def test_exponent_one_is_independent() -> None:
    sequences, per_sequence = np.array(GRID).T
    free = CorrelatedActivation(exponent=1.0)(sequences, per_sequence, 64, 8)
    assert free == pytest.approx(IidActivation()(sequences, per_sequence, 64, 8))


def test_published_single_sequence_unions_fit_near_the_default() -> None:
    """Seven sources: E, K, consecutive tokens and the distinct experts that were measured."""
    rows = [(128, 8, 4, 20.36), (256, 10, 5, 36.1), (256, 10, 16, 67.6), (256, 8, 8, 39.4)]
    rows += [(256, 8, 15, 58.9), (64, 4, 2, 6.97), (64, 8, 31, 39)]
    exponents = [np.log(effective_tokens(n, e, k)) / np.log(t) for e, k, t, n in rows]
    assert np.median(exponents) == pytest.approx(CorrelatedActivation().exponent, abs=0.03)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"exponent must lie in \(0, 1\], got 1.5"):
        CorrelatedActivation(exponent=1.5)

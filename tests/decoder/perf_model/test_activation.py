"""Distinct experts of correlated tokens: formulas, fits and tables."""

import numpy as np
import pytest

from decoder.perf_model.activation import (
    CorrelatedActivation,
    IidActivation,
    MeasuredActivation,
    Union,
    fit_activation,
)
from decoder.perf_model.theory import active_experts

GRID = [(b, q) for b in (1, 2, 4, 8, 16) for q in (1, 2, 3, 5, 9)]


def simulated_union(sequences: int, per_sequence: int, keep: float) -> float:
    """Mean union over trials when each token repeats its predecessor's experts with rate keep."""
    random = np.random.default_rng(sequences * 100 + per_sequence)
    sizes = []
    for _ in range(40):
        union: set[int] = set()
        for _ in range(sequences):
            chosen = random.choice(64, 8, replace=False)
            union.update(chosen)
            for _ in range(per_sequence - 1):
                if random.random() > keep:
                    chosen = random.choice(64, 8, replace=False)
                union.update(chosen)
        sizes.append(len(union))
    return float(np.mean(sizes))


def test_iid_is_equation_8() -> None:
    assert IidActivation()(3, 4, 64, 8) == active_experts(12, 64, 8)


def test_exponent_one_is_independent() -> None:
    sequences, per_sequence = np.array(GRID).T
    free = CorrelatedActivation(exponent=1.0)(sequences, per_sequence, 64, 8)
    assert free == pytest.approx(IidActivation()(sequences, per_sequence, 64, 8))


def test_fit_recovers_exponent_and_skew() -> None:
    truth = CorrelatedActivation(exponent=0.7, skew=0.9)
    unions = [Union(b, q, float(truth(b, q, 64, 8))) for b, q in GRID]
    fitted = fit_activation(unions, 64, 8)
    assert fitted.exponent == pytest.approx(0.7, abs=1e-6)
    assert fitted.skew == pytest.approx(0.9, abs=1e-6)


def test_published_single_sequence_unions_fit_near_the_default() -> None:
    """paper.md section 4, all seven sources, each with its own E and K."""
    rows = [(128, 8, 4, 20.36), (256, 10, 5, 36.1), (256, 10, 16, 67.6), (256, 8, 8, 39.4)]
    rows += [(256, 8, 15, 58.9), (64, 4, 2, 6.97), (64, 8, 31, 39)]
    exponents = [fit_activation([Union(1, t, n)], e, k).exponent for e, k, t, n in rows]
    assert np.median(exponents) == pytest.approx(CorrelatedActivation().exponent, abs=0.03)


def test_table_beats_iid_on_correlated_tokens() -> None:
    unions = [Union(b, q, simulated_union(b, q, keep=0.5)) for b, q in GRID]
    table = MeasuredActivation(tuple(unions), 64, 8)
    for sequences, per_sequence in [(1, 4), (3, 5), (6, 7)]:
        truth = simulated_union(sequences, per_sequence, keep=0.5)
        iid = float(IidActivation()(sequences, per_sequence, 64, 8))
        measured = float(table(sequences, per_sequence, 64, 8))
        assert abs(measured / truth - 1) < 0.1
        assert abs(measured - truth) < abs(iid - truth)


def test_table_reproduces_its_points_and_broadcasts() -> None:
    unions = (Union(1, 4, 20.0), Union(2, 4, 30.0))
    table = MeasuredActivation(unions, 64, 8)
    assert table(np.array([1, 2]), 4, 64, 8) == pytest.approx([20.0, 30.0], rel=1e-3)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"exponent must lie in \(0, 1\], got 1.5"):
        CorrelatedActivation(exponent=1.5)
    with pytest.raises(ValueError, match="below 64 experts, got 1 measurements"):
        MeasuredActivation((Union(64, 5, 64.0),), 64, 8)
    with pytest.raises(ValueError, match="several tokens below full activation, got none"):
        fit_activation([Union(1, 1, 8.0), Union(99, 9, 64.0)], 64, 8)

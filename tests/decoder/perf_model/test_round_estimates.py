"""What the γ controller knows: acceptance per position, and round costs from a profile."""

import random

import pytest

from decoder.gamma.acceptance import AcceptanceEstimator
from decoder.gamma.step_cost import CorrectedCost, MeasuredCost


def test_an_n_gram_drafter_that_often_has_nothing() -> None:
    """Drafts exist for a quarter of the rows: what counts is what a round really emits."""
    estimator = AcceptanceEstimator(4)
    for _ in range(100):
        estimator.update(4, [4, 0, 0, 0], [4, 0, 0, 0])
    assert estimator.conditional()[0] == pytest.approx(0.25, abs=0.03)
    assert estimator.expected_tokens()[4] == pytest.approx(2.0, abs=0.1)


def test_acceptance_estimate() -> None:
    fresh = AcceptanceEstimator(4, prior_mean=0.7)
    assert fresh.conditional() == pytest.approx([0.7] * 4)
    mixed = AcceptanceEstimator(4)
    for _ in range(200):  # half the rows accept everything, half nothing
        mixed.update(4, [4] * 8, [4, 0] * 4)
    rates = mixed.conditional()
    assert rates[0] == pytest.approx(0.5, abs=0.02)
    assert min(rates[1:]) > 0.95  # conditional on surviving position 1
    assert mixed.expected_tokens()[4] == pytest.approx(3.0, abs=0.1)
    known = mixed.trials
    for _ in range(1000):
        mixed.update(0, [], [])
    assert 15 < mixed.trials < known  # evidence ages, but not to nothing
    assert mixed.conditional()[0] == pytest.approx(0.5, abs=0.15)


def test_estimate_jumps_when_acceptance_does() -> None:
    random_ = random.Random(0)
    estimator = AcceptanceEstimator(1)
    for rate, rounds in ((0.9, 400), (0.2, 80)):
        for _ in range(rounds):
            estimator.update(1, [1], [int(random_.random() < rate)])
    assert estimator.conditional()[0] < 0.45


def test_measured_cost_interpolates() -> None:
    cost = MeasuredCost({(1, 0): 1.0, (1, 4): 2.0, (16, 0): 4.0, (16, 4): 8.0})
    assert cost(1, 2) == pytest.approx(1.5)
    assert cost(4, 0) == pytest.approx(2.0)  # log-log between batches
    assert cost(4, 4) == pytest.approx(4.0)
    assert cost(64, 0) == pytest.approx(8.0)  # the slope goes on
    assert cost(1, 8) == pytest.approx(3.0)
    assert MeasuredCost({(8, 0): 1.0, (8, 1): 1.5})(64, 3) == pytest.approx(2.5)


def test_correction_spreads_to_neighbours_only() -> None:
    costs = CorrectedCost(lambda batch, gamma, context: 1.0)
    for _ in range(9):
        costs.observe(8, 2, 100, 3.0)
    assert costs.seconds(8, 2, 100) == pytest.approx(3.0)
    assert costs.observations(8, 2) == 9
    for _ in range(9):
        costs.observe(8, 8, 100, 1.0)
    assert costs.seconds(8, 3, 100) > 1.8
    assert costs.seconds(8, 8, 100) == pytest.approx(1.0)
    costs.observe(8, 2, 100, float("nan"))
    assert costs.seconds(8, 2, 100) == pytest.approx(3.0)

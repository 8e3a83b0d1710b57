"""The forecast of a run: exact where nothing is left to chance, close to Eq. 5 elsewhere."""

import pytest

from decoder.gamma.acceptance import expected_tokens
from decoder.gamma.forecast import RunCosts, forecast_ratio
from decoder.perf_model.theory import expected_tokens as equation_5


def rounds(batch, gamma, context):
    """A second a row, and a tenth for each draft."""
    return batch * (1 + 0.1 * gamma)


def flat(batch, gamma, context):
    return 1.0


def ratio(alphas, lengths, gammas, cost=flat, prompts=(0.0, 0.0), batch_size=8):
    return forecast_ratio(RunCosts(cost, *prompts), alphas, lengths, gammas, batch_size)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        # 24 tokens after the first: 24 steps, or 6 rounds of 4.
        (ratio([1.0], [25], [3]), 4.0),
        (ratio([0.0], [25], [3]), 1.0),
        (ratio([0.0], [25], [5], rounds), 24 / (19 * 1.5 + 1.4 + 1.3 + 1.2 + 1.1 + 1.0)),
        # The last rounds draft no more than there is room for.
        (ratio([1.0], [11], [3], rounds), 10 / (1.3 + 1.3 + 1.1)),
        # Prefill: two seconds more on both sides, then on one.
        (ratio([1.0], [25], [3], prompts=(2.0, 2.0)), 26 / 8),
        (ratio([1.0], [25], [3], prompts=(0.0, 2.0)), 24 / 8),
        # The slow one ends alone, after six rounds of both.
        (ratio([1.0, 0.0], [25, 25], [3], rounds), 48 / (6 * 2.6 + 15 * 1.3 + 1.2 + 1.1 + 1.0)),
        # One row, two sequences: they wait for each other.
        (ratio([1.0, 1.0], [25, 13], [3], batch_size=1), 4.0),
        # Of several draft lengths the fastest, plain steps included.
        (ratio([1.0], [25], [0, 1, 3]), 4.0),
        (ratio([0.0], [25], [0, 1, 3], rounds), 1.0),
        (ratio([0.5], [1], [3], prompts=(1.0, 1.0)), 1.0),
    ],
)
def test_ratio(asked, expected):
    assert asked == pytest.approx(expected)


def test_chance_averages_to_equation_5():
    assert ratio([0.8], [4001], [4]) == pytest.approx(float(equation_5(0.8, 4)), rel=0.02)
    assert expected_tokens([0.8] * 4)[-1] == pytest.approx(float(equation_5(0.8, 4)))


@pytest.mark.parametrize(
    ("alphas", "lengths", "gammas"), [([], [], [1]), ([0.5], [], [1]), ([0.5], [3], [])]
)
def test_what_cannot_be_forecast_is_refused(alphas, lengths, gammas):
    with pytest.raises(ValueError, match="expected one alpha for each length"):
        ratio(alphas, lengths, gammas)

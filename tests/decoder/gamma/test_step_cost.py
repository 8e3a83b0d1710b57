"""Round times measured at start-up: what is kept of them, and what is refused."""

import time

import pytest

from decoder.gamma.step_cost import MeasuredCost, measure_costs


class Clock:
    """The n-th call takes n seconds."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, batch: int, gamma: int) -> float:
        self.calls.append((batch, gamma))
        return float(len(self.calls))


def test_the_first_timing_is_dropped_where_there_is_another() -> None:
    clock = Clock()
    costs = measure_costs(clock, [2], [1], repeats=1)
    assert clock.calls == [(2, 0), (2, 1)] * 2
    assert (costs(2, 0), costs(2, 1)) == (3.0, 4.0)


def test_past_the_deadline_the_first_timing_is_what_there_is() -> None:
    clock = Clock()
    costs = measure_costs(clock, [2], [1], repeats=3, deadline=time.perf_counter())
    assert clock.calls == [(2, 0), (2, 1)]
    assert (costs(2, 0), costs(2, 1)) == (1.0, 2.0)


def test_between_measurements() -> None:
    """Linear over gamma, log-log over batch."""
    costs = MeasuredCost({(1, 0): 1.0, (1, 4): 3.0, (16, 0): 4.0, (16, 4): 12.0})
    assert costs(1, 2) == pytest.approx(2.0)
    assert costs(4, 0) == pytest.approx(2.0)
    assert costs(64, 0) == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ({}, "at least one measurement, got none"),
        ({(1, 0): 1.0}, "needs gamma 0 and another gamma"),
        ({(1, 0): -1.0, (1, 1): 1.0}, "a positive time"),
    ],
)
def test_errors(seconds: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeasuredCost(seconds)

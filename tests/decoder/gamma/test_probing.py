"""The books of the controller's probes: what is charged, and what is allowed next."""

import pytest

from decoder.gamma.auto import AutoGamma
from decoder.gamma.probing import Probe, ProbeBudget

CONTEXT = 100
COSTLY = Probe(gamma=2, rounds=1, loss=1.0, credit=0.0)


def spent(seconds: float) -> ProbeBudget:
    budget = ProbeBudget()
    budget.spend(1, seconds)
    return budget


def test_nothing_is_allowed_before_time_was_spent_unless_within_half_a_percent_of_it():
    assert not ProbeBudget().allows(COSTLY, CONTEXT)
    assert not spent(199.0).allows(COSTLY, CONTEXT)
    assert spent(201.0).allows(COSTLY, CONTEXT)
    assert spent(1.0).allows(COSTLY._replace(credit=1.0), CONTEXT)


def test_what_promises_less_waits_longer():
    doubtful = COSTLY._replace(promise=0.5)
    assert not spent(799.0).allows(doubtful, CONTEXT)
    assert spent(801.0).allows(doubtful, CONTEXT)


def test_a_probe_is_charged_what_it_lost():
    budget = spent(1000.0)
    assert budget.allows(COSTLY, CONTEXT)
    budget.charge(5.0, worth=3.5)
    assert budget.lost_share == pytest.approx(1.5 / 1000)


def test_a_stall_is_charged_up_to_twice_the_expected_loss():
    budget = spent(1000.0)
    assert budget.allows(COSTLY, CONTEXT)
    budget.charge(500.0, worth=3.0)
    assert budget.lost_share == pytest.approx(2.0 / 1000)


def test_a_probe_that_gained_still_counts():
    """A flat optimum would otherwise be probed all the time."""
    budget = spent(1000.0)
    assert budget.allows(COSTLY._replace(loss=0.0), CONTEXT)
    budget.charge(4.0, worth=5.0)
    assert budget.lost_share == pytest.approx(0.25 / 1000)


def test_catching_up_on_plain_rounds_is_expected_of_the_next_draft():
    budget = spent(201.0)
    for _ in range(10):
        budget.spend(0, 0.0)
    budget.observe_catch_up(1.0, CONTEXT)
    assert not budget.allows(COSTLY, CONTEXT)
    assert budget.allows(COSTLY._replace(gamma=0), CONTEXT)
    budget.spend(2, 0.0)  # caught up
    assert budget.allows(COSTLY, CONTEXT)


def test_catching_up_never_costs_more_than_the_row_is_long():
    """However long drafts were not worth it, half a percent of that time pays for another look."""
    budget = ProbeBudget()
    budget.spend(0, 10.0)
    budget.observe_catch_up(4.0, CONTEXT)  # the whole of every row: no draft came before
    budget.spend(1, 0.0)
    for _ in range(1000):
        budget.spend(0, 0.1)
    assert not budget.allows(COSTLY, CONTEXT)  # 4 s to catch up, 0.55 s to lose
    for _ in range(9000):
        budget.spend(0, 0.1)
    assert budget.allows(COSTLY, CONTEXT)


@pytest.mark.parametrize(("context", "timed"), [(100, 1), (0, 2)])
def test_a_draft_after_plain_rounds_is_a_timing_where_there_is_nothing_to_catch_up_on(
    context: int, timed: int
) -> None:
    controller = AutoGamma(2)
    for _ in range(2):
        controller.choose(4, context)
        controller._asked_before = 0
        controller.observe(1, 4, [1] * 4, [1] * 4, {"total": 1.0})
    controller._learn()
    assert controller._costs.observations(4, 1) == timed


@pytest.mark.parametrize("rounds", [100, 50_000])
def test_what_was_lost_long_ago_forbids_no_probe(rounds: int) -> None:
    """A server drafts for long, probing all that it may; then plain decoding becomes the best."""
    budget, neighbour = spent(1.0), COSTLY._replace(loss=0.02, promise=0.98)
    for _ in range(rounds):
        budget.spend(4, 1.0)
        if budget.allows(neighbour, CONTEXT):
            budget.charge(1.02, worth=1.0)
    assert budget.lost_share < 0.0055
    waited, doubtful = 0, COSTLY._replace(loss=0.4, promise=0.6)
    while not budget.allows(doubtful, CONTEXT):
        budget.spend(0, 1.0)
        waited += 1
    assert waited < 1500


def test_a_pause_earns_no_probes() -> None:
    """A process that was stopped for hours: one round took as long as a million others."""
    budget, doubtful = spent(1.0), COSTLY._replace(loss=0.4, promise=0.6)
    probes = 0
    for seconds in [1.0] * 300 + [1e6] + [1.0] * 1000:
        budget.spend(0, seconds)
        if budget.allows(doubtful, CONTEXT):
            budget.charge(1.4, worth=1.0)
            probes += 1
    assert 0 < probes < 20

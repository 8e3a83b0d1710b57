"""Prompts a drafter reads count against drafting, where outputs are too short to repay it."""

import pytest

from decoder.engine.metrics import DecoderStats
from decoder.gamma.auto import AutoGamma
from decoder.gamma.step_cost import MeasuredCost

BATCH, CONTEXT = 8, 100
COSTS = MeasuredCost({(BATCH, 0): 1.0, (BATCH, 4): 1.5})


def speculating() -> AutoGamma:
    """A controller that has come to draft, because nearly everything is accepted."""
    controller = AutoGamma(4)
    controller.use_costs(COSTS)
    run(controller, 200)
    assert controller.choose(BATCH, CONTEXT) > 0
    return controller


def run(controller: AutoGamma, rounds: int) -> list[int]:
    chosen = []
    for _ in range(rounds):
        gamma = controller.choose(BATCH, CONTEXT)
        times = {"verify": COSTS(BATCH, gamma)}
        controller.observe(gamma, BATCH, [gamma] * BATCH, [gamma] * BATCH, times)
        chosen.append(gamma)
    return chosen


@pytest.mark.parametrize(("seconds", "worth_it"), [(0.1, True), (20.0, False)])
def test_short_outputs_do_not_repay_a_drafters_prompts(seconds: float, worth_it: bool) -> None:
    """Plain decoding takes 0.125 s per token, drafting 0.04 s and ``seconds / 80`` for prompts."""
    controller = speculating()
    for _ in range(4):
        controller.admitted(80.0, seconds, 100)
    assert (run(controller, 100)[-1] > 0) == worth_it


def test_prompts_that_an_idle_drafter_reads_as_well_are_no_cost_of_drafting() -> None:
    controller = AutoGamma(4)
    controller.use_costs(COSTS)
    for _ in range(4):
        controller.admitted(80.0, 20.0, 100)  # before any draft
    run(controller, 200)
    for _ in range(4):
        controller.admitted(80.0, 20.0, 100)
    assert run(controller, 100)[-1] > 0


@pytest.mark.parametrize(("outputs", "prompts"), [(1.0, 100), (80.0, 2000)])
def test_prompts_that_do_not_repay_a_drafter_stop_it_no_longer_than_they_come(
    outputs: float, prompts: int
) -> None:
    """Then chats come again, whose prompts a drafter that does not draft never reads."""
    controller = speculating()
    for _ in range(4):
        controller.admitted(outputs, 0.01 * prompts, prompts)
    assert run(controller, 100)[-1] == 0
    for _ in range(16):
        controller.admitted(800.0, 0.0, 10)
    assert run(controller, 200)[-1] > 0


def test_outputs_that_still_run_count_for_the_length_to_expect() -> None:
    """Of 16 outputs of 100 tokens and one of 8, the short one finishes first."""
    stats = DecoderStats()
    assert stats.output_to_expect(256.0) == 256.0
    for _ in range(7):
        stats.observe(0, [0] * 17, [0] * 17, {"verify": 1.0})
    stats.end([8])
    assert stats.output_to_expect(256.0) == 1 + 7 * 17
    assert stats.output_to_expect(100.0) == 100.0


def test_the_length_to_expect_is_that_of_late() -> None:
    """A server that answered shortly for days now writes at length."""
    stats = DecoderStats()
    for length, count in ((10, 20_000), (500, 1000)):
        for _ in range(count):
            stats.observe(length - 2, [length - 2], [length - 2], {"verify": 1.0})
            stats.end([length])
        assert stats.output_to_expect(512.0) == pytest.approx(length, rel=0.05)

"""The γ controller against a simulator with known costs and acceptance."""

import random
import time
from collections.abc import Callable

import pytest

from decoder.gamma.acceptance import AcceptanceEstimator
from decoder.gamma.auto import AutoGamma
from decoder.gamma.base import FixedGamma
from decoder.gamma.learned_cost import LearnedCost
from decoder.gamma.step_cost import measure_costs

MAX_GAMMA = 8
Cost = Callable[[int, int], float]


def moe_cost(batch: int, gamma: int) -> float:
    """A 64-expert MoE: experts load until all are active, then compute grows; cheap draft."""
    tokens = batch * (gamma + 1)
    experts = 64 * (1 - (1 - 4 / 64) ** tokens)
    verify = 4.0 + 0.25 * max(experts, tokens * 4 / 12) + 0.03 * tokens
    return 1e-3 * (verify + gamma * (0.9 + 0.01 * batch) + 0.3)


def launch_bound_cost(batch: int, gamma: int) -> float:
    """Verification nearly free, draft as slow as a third of the target."""
    return 1e-3 * (6.0 + 0.02 * batch * (gamma + 1) + 2.0 * gamma)


def compute_bound_cost(batch: int, gamma: int) -> float:
    """Cost proportional to tokens: speculation always loses."""
    return 1e-3 * (1.0 + batch * (gamma + 1) + 0.3 * gamma)


def draft_share(cost: Cost, batch: int, gamma: int) -> float:
    """Share of a round that goes into drafting; the constants are those of the costs above."""
    step = {moe_cost: 0.9 + 0.01 * batch, launch_bound_cost: 2.0, compute_bound_cost: 0.3}[cost]
    return gamma * step * 1e-3 / cost(batch, gamma)


class Simulator:
    """Runs a controller over rounds of known cost and acceptance; counts tokens and seconds."""

    def __init__(self, controller, cost: Cost, seed: int = 0, noise: float = 0.05) -> None:
        self.controller, self.cost, self.noise = controller, cost, noise
        self.random = random.Random(seed)
        self.tokens = 0
        self.seconds = 0.0
        self.plain_seconds = 0.0  # what plain decoding would have taken for the same tokens
        self.history: list[int] = []

    def measured(self, batch: int, gamma: int) -> float:
        outlier = 5.0 if self.random.random() < 0.01 else 1.0
        return self.cost(batch, gamma) * outlier * self.random.lognormvariate(0.0, self.noise)

    def round(self, batch: int, alpha: float | list[float], context: int = 100) -> None:
        rates = alpha if isinstance(alpha, list) else [alpha] * MAX_GAMMA
        gamma = self.controller.choose(batch, context)
        assert 0 <= gamma <= MAX_GAMMA
        accepted = []
        for _ in range(batch):
            count = 0
            while count < gamma and self.random.random() < rates[count]:
                count += 1
            accepted.append(count)
        # Time is charged without noise, so that ratios compare decisions and not luck.
        self.seconds += self.cost(batch, gamma)
        self.tokens += batch + sum(accepted)
        self.plain_seconds += (batch + sum(accepted)) / batch * self.cost(batch, 0)
        self.history.append(gamma)
        seconds = self.measured(batch, gamma)
        draft = draft_share(self.cost, batch, gamma) * seconds
        rest = seconds - draft
        times = {"draft": draft, "verify": 0.8 * rest, "sample": 0.1 * rest, "host": 0.1 * rest}
        self.controller.observe(gamma, batch, [gamma] * batch, accepted, times)

    def run(self, batch: int, alpha: float | list[float], tokens_per_row: int) -> float:
        start_tokens, start_seconds = self.tokens, self.seconds
        while self.tokens - start_tokens < tokens_per_row * batch:
            self.round(batch, alpha)
        return (self.tokens - start_tokens) / (self.seconds - start_seconds)


def fixed_rate(cost: Cost, batch: int, gamma: int, alpha: float) -> float:
    emitted = sum(alpha**position for position in range(gamma + 1))
    return batch * emitted / cost(batch, gamma)


def profiled(cost: Cost, max_batch: int = 64, seed: int = 1) -> AutoGamma:
    noise = random.Random(seed)
    measure = lambda b, g: cost(b, g) * noise.lognormvariate(0.0, 0.05)
    return started(measure, max_batch)


def started(measure: Cost, max_batch: int) -> AutoGamma:
    """A controller with a start-up profile of a few batch sizes."""
    controller = AutoGamma(MAX_GAMMA)
    batches = [size for size in (1, 4, 16, 64) if size < max_batch] + [max_batch]
    controller.use_costs(measure_costs(measure, batches, (1, 3, MAX_GAMMA)))
    return controller


def mean_ratios(make, cost: Cost, batch: int, alpha: float, tokens: int) -> tuple[float, float]:
    """Rate over the best fixed gamma's and over plain decoding's, mean of eight seeds."""
    best = max(fixed_rate(cost, batch, gamma, alpha) for gamma in range(MAX_GAMMA + 1))
    rates = [Simulator(make(seed), cost, seed).run(batch, alpha, tokens) for seed in range(8)]
    rate = sum(rates) / 8
    return rate / best, rate / fixed_rate(cost, batch, 0, alpha)


GRID = [(moe_cost, batch) for batch in (1, 2, 4, 8, 16, 32, 64)]
GRID += [(cost, batch) for cost in (launch_bound_cost, compute_bound_cost) for batch in (1, 8, 64)]


@pytest.mark.parametrize("known", [True, False], ids=["profiled", "first rounds"])
@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("cost", "batch"), GRID)
def test_bars_over_batch_and_acceptance(cost: Cost, batch: int, alpha: float, known: bool) -> None:
    """A fresh controller, learning included: 0.95x of the best gamma, 0.97x of plain decoding."""
    make = (
        (lambda seed: profiled(cost, seed=seed + 10)) if known else lambda _: AutoGamma(MAX_GAMMA)
    )
    over_best, over_plain = mean_ratios(make, cost, batch, alpha, tokens=512)
    assert over_best >= 0.95
    assert over_plain >= 0.97


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_follows_an_acceptance_that_changes(batch: int) -> None:
    """Prose turns to code and back: each phase near its own best, never far below plain."""
    simulator = Simulator(profiled(moe_cost), moe_cost, seed=3)
    simulator.run(batch, 0.3, 300)
    for alpha in (0.9, 0.2, 0.8):
        rate = simulator.run(batch, alpha, 1200)
        best = max(fixed_rate(moe_cost, batch, gamma, alpha) for gamma in range(MAX_GAMMA + 1))
        assert rate >= 0.9 * best, (alpha, simulator.controller.explain())
    assert simulator.plain_seconds / simulator.seconds > 1.0


@pytest.mark.parametrize("alpha", [0.3, 0.9])
@pytest.mark.parametrize("known", [True, False])
def test_shrinking_batch_at_the_tail(alpha: float, known: bool) -> None:
    """64 rows end one after the other; the batch sizes in between were never profiled."""
    controller = profiled(moe_cost) if known else AutoGamma(MAX_GAMMA)
    simulator = Simulator(controller, moe_cost, seed=5)
    best_seconds = 0.0
    for batch in range(64, 0, -1):
        start = simulator.tokens
        simulator.run(batch, alpha, 30)
        best = max(fixed_rate(moe_cost, batch, gamma, alpha) for gamma in range(MAX_GAMMA + 1))
        best_seconds += (simulator.tokens - start) / best
    assert best_seconds / simulator.seconds >= 0.95
    assert simulator.plain_seconds / simulator.seconds >= 0.97


def test_probing_is_rare_and_cheap() -> None:
    simulator = Simulator(profiled(moe_cost), moe_cost)
    simulator.run(4, 0.2, 4000)
    late = simulator.history[500:]
    assert 0 < sum(gamma > 0 for gamma in late) < 0.05 * len(late)
    assert simulator.plain_seconds / simulator.seconds > 0.98


def test_heavy_noise_and_stalls() -> None:
    """20 % jitter and a stall in every hundred rounds, through the profile as well."""
    for alpha, batch in [(0.3, 8), (0.9, 8), (0.9, 64)]:
        noisy = Simulator(None, moe_cost, seed=9, noise=0.2)
        controller = started(noisy.measured, 64)
        simulator = Simulator(controller, moe_cost, seed=9, noise=0.2)
        rate = simulator.run(batch, alpha, 1000)
        best = max(fixed_rate(moe_cost, batch, gamma, alpha) for gamma in range(MAX_GAMMA + 1))
        assert rate >= 0.92 * best


def test_one_stalled_first_timing_does_not_lock_the_choice() -> None:
    """Every first rounds' timing of plain decoding is five times too slow."""
    simulator = Simulator(AutoGamma(MAX_GAMMA), moe_cost, seed=1)
    stalled = 2

    def measured(batch: int, gamma: int) -> float:
        nonlocal stalled
        if gamma == 0 and stalled > 0:
            stalled -= 1
            return 5.0 * moe_cost(batch, gamma)
        return moe_cost(batch, gamma)

    simulator.measured = measured  # type: ignore[method-assign]
    simulator.run(8, 0.2, 1500)
    assert simulator.plain_seconds / simulator.seconds > 0.95
    assert simulator.history[-1] == 0


def test_a_drafter_that_tires() -> None:
    """An EAGLE head's later positions are accepted less; the best gamma is short."""
    rates = [0.85, 0.6, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1]
    simulator = Simulator(profiled(launch_bound_cost), launch_bound_cost)
    simulator.run(16, rates, 600)
    late = simulator.history[len(simulator.history) // 2 :]
    assert max(set(late), key=late.count) in (1, 2)


def test_wrong_profile_is_corrected() -> None:
    """A profile taken while verification was twice as cheap, say on an idle machine."""

    def optimistic(batch: int, gamma: int, context: int) -> float:
        return compute_bound_cost(batch, gamma) * (0.5 if gamma else 1.0)

    simulator = Simulator(AutoGamma(MAX_GAMMA, costs=optimistic), compute_bound_cost)
    simulator.run(16, 0.6, 1000)
    assert simulator.plain_seconds / simulator.seconds > 0.95
    assert simulator.history[-50:].count(0) > 40


@pytest.mark.parametrize("cap", [0, 1])
def test_a_drafter_that_never_fills_the_arm_asked_for(cap: int) -> None:
    """First timings must end although the rounds run are shorter than the rounds asked for."""
    controller = AutoGamma(MAX_GAMMA)
    asked = []
    for _ in range(200):
        asked.append(controller.choose(4, 100))
        gamma = min(asked[-1], cap)
        times = {"draft": 1e-4 * gamma, "verify": 5e-3}
        controller.observe(gamma, 4, [gamma] * 4, [0] * 4, times)
    assert asked[20:].count(0) > 150 if cap else len(set(asked)) > 1
    assert "first timings" not in controller.explain()


def test_learned_cost_carries_over_between_batches_and_gammas() -> None:
    """Verification over 32 tokens costs the same as 32 x 1, 16 x 2 or 4 x 8."""
    costs = LearnedCost()
    assert costs.seconds(8, 4, 100) == 1.0
    for batch, gamma in [(32, 0), (32, 1), (16, 0), (4, 1)]:
        for _ in range(3):
            time_ = moe_cost(batch, gamma)
            share = draft_share(moe_cost, batch, gamma)
            costs.observe(batch, gamma, 100, time_, share * time_)
    assert costs.knows_draft() and costs.knows_verify(30, 1.2) and not costs.knows_verify(2, 2)
    for batch, gamma in [(16, 1), (16, 3), (8, 7), (4, 7)]:
        assert costs.seconds(batch, gamma, 100) == pytest.approx(moe_cost(batch, gamma), rel=0.05)
    for _ in range(9):  # an arm with rounds of its own overrules the curves
        costs.observe(16, 3, 100, 1.0, 0.1)
    assert costs.seconds(16, 3, 100) == pytest.approx(1.0)
    costs.observe(16, 3, 100, float("nan"))
    assert costs.observations(16, 3) == 9


def test_fixed_gamma() -> None:
    controller = FixedGamma(3)
    assert controller.choose(8, 100) == 3 and controller.max_gamma == 3
    controller.observe(3, 8, [3] * 8, [1] * 8, {"verify": 1.0})
    assert controller.choose(1, 100) == 3
    assert controller.explain() == "gamma 3: fixed by the caller"


def test_explain_gives_the_reason() -> None:
    simulator = Simulator(profiled(moe_cost), moe_cost)
    assert "no round" in simulator.controller.explain()
    simulator.run(32, 0.9, 200)
    text = simulator.controller.explain()
    for piece in ("at batch 32", "tok/s predicted", "x plain decoding", "acceptance by position"):
        assert piece in text


def test_deciding_is_cheap() -> None:
    """Under 0.2 ms of CPU a round: the fastest models take several ms a step."""
    controller = profiled(moe_cost)
    accepted = [2] * 64
    best = float("inf")
    for _ in range(10):
        started = time.process_time()
        for _ in range(50):
            gamma = controller.choose(64, 100)
            done = [min(gamma, a) for a in accepted]
            controller.observe(gamma, 64, [gamma] * 64, done, {"verify": moe_cost(64, gamma)})
        best = min(best, (time.process_time() - started) / 50)
    assert best < 2e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AutoGamma(0), "max_gamma must be at least 1, got 0"),
        (lambda: FixedGamma(-1), "gamma must be at least 0, got -1"),
        (lambda: AutoGamma(4, acceptance_prior=1.0), r"prior_mean must lie in \(0, 1\), got 1.0"),
        (lambda: AcceptanceEstimator(2).update(3, [3], [1]), "at most max_gamma=2, got 3"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

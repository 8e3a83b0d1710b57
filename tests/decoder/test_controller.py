"""The γ controller against a simulator with known costs and acceptance."""

import random
from collections.abc import Callable

import pytest

from decoder.controller import AutoGamma, FixedGamma
from decoder.perf_model.acceptance import AcceptanceEstimator
from decoder.perf_model.step_cost import CorrectedCost, MeasuredCost

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
        times = {"draft": 0.3 * seconds, "verify": 0.6 * seconds, "sample": 0.1 * seconds}
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
    controller = AutoGamma(
        MAX_GAMMA, measure=lambda b, g: cost(b, g) * noise.lognormvariate(0.0, 0.05)
    )
    controller.profile(max_batch)
    return controller


@pytest.mark.parametrize("cost", [moe_cost, launch_bound_cost, compute_bound_cost])
@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32, 64])
def test_bars_over_batch_and_acceptance(cost: Cost, alpha: float, batch: int) -> None:
    """Fresh controller each time, exploration included: 0.95x of the best, 0.97x of plain."""
    ratios_best, ratios_plain = [], []
    for seed in range(3):
        simulator = Simulator(profiled(cost, seed=seed + 10), cost, seed)
        rate = simulator.run(batch, alpha, tokens_per_row=512)
        best = max(fixed_rate(cost, batch, gamma, alpha) for gamma in range(MAX_GAMMA + 1))
        ratios_best.append(rate / best)
        ratios_plain.append(rate / fixed_rate(cost, batch, 0, alpha))
    # At B = 1 the tokens themselves are few; their scatter, not the choice, needs the mean.
    mean_best, mean_plain = sum(ratios_best) / 3, sum(ratios_plain) / 3
    assert mean_best >= 0.95, ratios_best
    assert mean_plain >= 0.97, ratios_plain

"""The paper's formulas against brute force and against the numbers that it states."""

import numpy as np
import pytest

from decoder.perf_model import theory
from decoder.perf_model.paper_tables import paper_cells


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 2, 5), (64, 8, 5), (60, 4, 33)])
def test_active_experts_equals_brute_force(experts: int, top_k: int, tokens: int) -> None:
    random = np.random.default_rng(0)
    scores = random.random((2000, tokens, experts))
    chosen = np.argpartition(scores, top_k, axis=2)[:, :, :top_k]
    distinct = [len(np.unique(trial)) for trial in chosen]
    expected = theory.active_experts(tokens, experts, top_k)
    assert abs(np.mean(distinct) - expected) < 4 * np.std(distinct) / np.sqrt(len(distinct)) + 1e-9


@pytest.mark.parametrize(("alpha", "gamma"), [(0.0, 3), (0.4, 1), (0.8, 4), (1.0, 5)])
def test_expected_tokens_equals_brute_force(alpha: float, gamma: int) -> None:
    accepted = np.random.default_rng(1).random((200_000, gamma)) < alpha
    emitted = 1 + np.cumprod(accepted, axis=1).sum(1)
    assert np.isclose(theory.expected_tokens(alpha, gamma), emitted.mean(), rtol=0.005)
    assert np.isclose(
        theory.sigma_from_alpha(alpha, gamma), emitted.mean() / (gamma + 1), rtol=0.005
    )


@pytest.mark.parametrize(
    ("top_k", "experts", "at_95", "at_99"),
    [
        (2, 8, 11, 17),
        (8, 64, 23, 35),
        (4, 32, 23, 35),
        (6, 64, 31, 47),
        (4, 60, 44, 67),
        (8, 128, 47, 72),
        (4, 128, 95, 146),
        (8, 256, 95, 146),
        (10, 512, 152, 234),
        (8, 8, 1, 1),  # dense
    ],
)
def test_full_activation_thresholds(top_k: int, experts: int, at_95: int, at_99: int) -> None:
    assert theory.full_activation_threshold(experts, top_k) == at_95
    assert theory.full_activation_threshold(experts, top_k, 0.99) == at_99


def test_stated_activation_numbers() -> None:
    """N(4) and N(5) of three models; shares at B = 16 and t = 80 of Qwen3-30B."""
    rows = [(8, 2, 5.5, 6.1), (64, 8, 26.5, 31.2), (128, 8, 29.1, 35.3)]
    for experts, top_k, at_4, at_5 in rows:
        assert theory.active_experts([4, 5], experts, top_k) == pytest.approx(
            [at_4, at_5], abs=0.06
        )
    shares = theory.active_experts([1, 5, 16, 80, 64], 128, 8) / 128
    assert shares == pytest.approx([0.06, 0.28, 0.64, 0.99, 0.98], abs=0.006)
    assert theory.tokens_per_active_expert(320, 64, 8) == pytest.approx(40, rel=0.01)
    assert theory.tokens_per_active_expert(320, 256, 8) == pytest.approx(10, rel=0.01)


def test_published_unions_give_the_stated_effective_tokens() -> None:
    rows = [(128, 8, 20.36, 2.7), (256, 10, 36.1, 3.8), (256, 8, 58.9, 8.2), (64, 8, 39, 7.0)]
    for experts, top_k, distinct, tokens in rows:
        assert theory.effective_tokens(distinct, experts, top_k) == pytest.approx(tokens, abs=0.06)


def test_tokens_per_expert_limits_and_monotone_in_sparsity() -> None:
    """Appendix B: at t > 1 sparser means fewer tokens per active expert; one token gives one."""
    assert theory.tokens_per_active_expert(1, 64, np.arange(1, 65)) == pytest.approx(1.0)
    assert np.all(np.diff(theory.tokens_per_active_expert(16, 64, np.arange(1, 65))) > 0)
    assert theory.tokens_per_active_expert(0, 64, 8) == 1.0


@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
def test_sigma_and_alpha_are_inverse(gamma: int) -> None:
    alpha = np.linspace(0, 1, 21)
    sigma = theory.sigma_from_alpha(alpha, gamma)
    assert theory.alpha_from_sigma(sigma, gamma) == pytest.approx(alpha, abs=1e-6)


def test_paper_sigma_of_the_best_result() -> None:
    assert theory.alpha_from_sigma(0.90, 4) == pytest.approx(0.947, abs=0.001)
    assert theory.alpha_from_sigma(0.54, 4) == pytest.approx(0.69, abs=0.01)


def test_conventions() -> None:
    assert theory.verify_tokens(8, 4, "paper") == 32
    assert theory.verify_tokens(8, 4, "engine") == 40
    with pytest.raises(ValueError, match=r"convention must be one of .* got 'vllm'"):
        theory.verify_tokens(8, 4, "vllm")  # type: ignore[arg-type]


def test_speedup_by_simulating_rounds() -> None:
    """Eq. 4 equals tokens over time of a simulated run."""
    random = np.random.default_rng(2)
    gamma, alpha, ar, draft, verify, reject = 3, 0.7, 10.0, 1.0, 13.0, 0.5
    emitted = 1 + np.cumprod(random.random((100_000, gamma)) < alpha, axis=1).sum(1)
    round_time = gamma * draft + verify + reject
    simulated = emitted.sum() * ar / (len(emitted) * round_time)
    times = {"ar_time": ar, "draft_time": draft, "verify_time": verify, "reject_time": reject}
    sigma = theory.sigma_from_alpha(alpha, gamma)
    assert theory.speedup_eq4(sigma, gamma, **times) == pytest.approx(simulated, rel=0.01)
    even = theory.break_even_alpha(gamma, round_time / ar)
    sigma = theory.sigma_from_alpha(even, gamma)
    assert theory.speedup_eq4(sigma, gamma, **times) == pytest.approx(1.0)


def test_break_even_is_nan_when_no_rate_is_enough() -> None:
    assert np.isnan(theory.break_even_alpha(2, 3.5))
    assert theory.break_even_alpha(2, 1.0) == pytest.approx(0.0, abs=1e-9)


def test_printed_line_11_cannot_explain_the_paper() -> None:
    """Bounded by sigma (gamma + 1) / 2, which 46 of the 60 measured cells exceed."""
    times = {"ar_time": 10.0, "draft_time": 0.0, "verify_time": 10.0}
    assert theory.speedup_alg1_as_printed(0.9, 4, **times) == pytest.approx(0.9 * 5 / 2)
    cells = paper_cells()
    assert len(cells) == 60
    assert sum(c.speedup > c.sigma * (c.gamma + 1) / 2 for c in cells) == 46
    for cell in cells:  # the transcription: x = T_AR / T_SD to rounding
        assert cell.ar_time / cell.speculative_time == pytest.approx(cell.speedup, abs=0.0065)


def test_roofline_growth_is_smooth_and_safe() -> None:
    ridge, base = 50.0, 1.02
    assert theory.roofline_growth(30, ridge, base) == pytest.approx(base**30)
    below, above = theory.roofline_growth([ridge - 1e-4, ridge + 1e-4], ridge, base)
    slope = (above - below) / 2e-4
    assert slope == pytest.approx(np.log(base) * base**ridge, rel=1e-3)  # C1 at the transition
    tangent = base**ridge * (1 + np.log(base) * 100)
    assert theory.roofline_growth(150, ridge, base) == pytest.approx(tangent)
    assert theory.roofline_growth(7, 50, 1.0) == 1.0
    assert np.isfinite(theory.roofline_growth(1e4, 1e4, 2.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.active_experts(4, 0, 1), "num_experts must be at least 1, got 0"),
        (lambda: theory.active_experts(4, 8, 9), r"top_k must lie in \[0.0, 8.0\], got 9"),
        (lambda: theory.active_experts(-1, 8, 2), "tokens must lie in"),
        (lambda: theory.expected_tokens(1.2, 3), r"alpha must lie in \[0.0, 1.0\], got 1.2"),
        (lambda: theory.alpha_from_sigma(0.1, 4), "sigma must be at least"),
        (lambda: theory.full_activation_threshold(8, 2, 1.0), "tau must lie in"),
        (lambda: theory.effective_tokens(8, 8, 2), "active must be below num_experts=8"),
        (lambda: theory.roofline_growth(4, 10, 0.5), "base must lie in"),
    ],
)
def test_errors_name_the_value(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

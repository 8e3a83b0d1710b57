"""The busiest rank's expected load against urns that are drawn from."""

import numpy as np
import pytest

from decoder.perf_model.parallel.busiest import busiest_active, busiest_rows


@pytest.mark.parametrize(
    ("rows", "ranks"),
    [(1, 2), (8, 4), (40, 8), (1000, 2), (1000, 64), (20_000, 256), (64, 1024)],
)
def test_rows_against_balls_in_bins(rows: int, ranks: int) -> None:
    random = np.random.default_rng(0)
    drawn = random.multinomial(rows, np.full(ranks, 1 / ranks), size=2000).max(1).mean()
    assert busiest_rows(rows, 1.0, ranks) == pytest.approx(drawn, rel=0.02)


@pytest.mark.parametrize(
    ("active", "experts", "ranks"),
    [(8, 64, 2), (30, 64, 4), (60, 64, 8), (8, 64, 64), (100, 256, 32), (250, 256, 64)],
)
def test_experts_against_hands_of_cards(active: int, experts: int, ranks: int) -> None:
    random = np.random.default_rng(0)
    blocks = np.full(ranks, experts // ranks)
    drawn = random.multivariate_hypergeometric(blocks, active, size=2000).max(1).mean()
    assert busiest_active(active, experts, ranks) == pytest.approx(drawn, rel=0.02)


def test_limits() -> None:
    assert busiest_active(64.0, 64, 8) == 8
    assert busiest_active(2.0, 64, 64) == 1
    assert busiest_active(30.0, 60, 8) <= 8  # 60 experts on 8 ranks: up to 8 each
    assert busiest_rows(1e9, 1.0, 64) == pytest.approx(1e9 / 64, rel=1e-3)
    assert busiest_rows(8, 100.0, 2) <= 8


def test_rows_that_go_together_are_less_even() -> None:
    loads = [busiest_rows(512, alike, 32) for alike in (1.0, 1.5, 3.0)]
    assert loads == sorted(loads) and loads[0] < loads[2]

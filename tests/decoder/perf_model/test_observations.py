"""Observations: checking, ordering, and the choice of cells to fit."""

import numpy as np
import pytest

from decoder.perf_model.observations import (
    Observation,
    d_optimal_indices,
    paper_order,
    require_points,
    spread_indices,
    stride_indices,
)

PAPER_BATCHES = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 80, 100)


def paper_grid() -> list[Observation]:
    cells = [
        Observation(batch, gamma, 0.9, speedup=1.5, top_k=top_k)
        for batch in PAPER_BATCHES
        for gamma in (2, 4)
        for top_k in (1, 2, 4, 8, 16, 32)
    ]
    return paper_order(cells)


def test_stride_picks_the_papers_21_cells() -> None:
    """The paper's Table 3 lists them, here as (K rank, gamma rank, B)."""
    cells = paper_grid()
    ranks = [1, 2, 4, 8, 16, 32]
    picked = [
        (ranks.index(cells[i].top_k or 0) + 1, cells[i].gamma // 2, cells[i].batch)
        for i in stride_indices(228, 21)
    ]
    assert picked == [
        (1, 1, 1), (1, 1, 40), (1, 2, 8), (1, 2, 52), (2, 1, 20), (2, 1, 80), (2, 2, 32),
        (3, 1, 2), (3, 1, 44), (3, 2, 12), (3, 2, 56), (4, 1, 24), (4, 1, 100), (4, 2, 36),
        (5, 1, 4), (5, 1, 48), (5, 2, 16), (5, 2, 60), (6, 1, 28), (6, 2, 1), (6, 2, 40),
    ]  # fmt: skip


def test_spread_covers_what_strides_miss() -> None:
    """The paper's bad fits lacked B > 40 (m = 12) or medium batches (m = 13)."""
    cells = paper_grid()
    for points in (10, 12, 13, 21):
        picked = [cells[i] for i in spread_indices(cells, points)]
        assert len({(c.batch, c.gamma, c.top_k) for c in picked}) == points
        assert {1, 100} <= {c.batch for c in picked}
        assert any(2 < c.batch < 24 for c in picked)
        assert {c.gamma for c in picked} == {2, 4}
        assert {1, 32} <= {c.top_k for c in picked}


def test_d_optimal_beats_strides_in_determinant() -> None:
    random = np.random.default_rng(0)
    jacobian = random.normal(size=(200, 6)) * np.linspace(0.1, 2.0, 200)[:, None]
    picked = d_optimal_indices(jacobian, 15)
    assert len(set(picked)) == 15

    def determinant(rows: list[int]) -> float:
        return float(np.linalg.slogdet(jacobian[rows].T @ jacobian[rows])[1])

    assert determinant(picked) > determinant(stride_indices(200, 15))


def test_json_round_trip_ignores_other_keys() -> None:
    cell = Observation(8, 4, 0.8, speedup=1.7, ar_time=0.01, top_k=2, context=300)
    data = cell.to_json() | {"device": "cpu", "commit": "abc"}
    assert Observation.from_json(data) == cell


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch >= 1"),
        ({"gamma": 0}, "gamma >= 1"),
        ({"sigma": 0.1}, "sigma must lie in"),
        ({"sigma": None}, "needs 'sigma'"),
        ({"speedup": None}, "needs one of"),
        ({"speedup": -1.0}, "speedup must be a positive number, got -1.0"),
        ({"speedup": float("nan")}, "speedup must be a positive number, got nan"),
        ({"batch": "8"}, "batch must be a number, got '8'"),
        ({"batch": 2.5}, "batch must be a whole number, got 2.5"),
        ({"verify_time": True}, "verify_time must be a number, got True"),
    ],
)
def test_malformed_cells_are_refused(change: dict, message: str) -> None:
    data = {"batch": 8, "gamma": 4, "sigma": 0.8, "speedup": 1.5} | change
    with pytest.raises(ValueError, match=message):
        Observation.from_json(data)


def test_too_few_points() -> None:
    cells = paper_grid()
    require_points(cells[:10])
    with pytest.raises(ValueError, match="at least 10 observations with speedup, got 9 of 9"):
        require_points(cells[:9])
    only_times = [Observation(b, 2, 0.5, ar_time=1.0) for b in range(1, 20)]
    with pytest.raises(ValueError, match="got 0 of 19"):
        require_points(only_times)
    with pytest.raises(ValueError, match="must be a JSON object, got list"):
        Observation.from_json([1, 2])  # type: ignore[arg-type]


def test_point_counts_are_checked() -> None:
    for choose in (
        lambda: stride_indices(5, 6),
        lambda: spread_indices(paper_grid()[:5], 6),
        lambda: d_optimal_indices(np.ones((5, 2)), 6),
    ):
        with pytest.raises(ValueError, match=r"points must lie in \[1, 5\], got 6"):
            choose()

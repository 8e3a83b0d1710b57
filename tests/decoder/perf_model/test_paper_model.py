"""The ten-parameter model: exact on its own data, honest about what data cannot tell."""

from dataclasses import astuple, replace

import numpy as np
import pytest

from decoder.perf_model.fit_report import evaluate
from decoder.perf_model.hardware.machine import named_machine
from decoder.perf_model.observations import Observation, spread_indices
from decoder.perf_model.paper_model import Bounds, PaperModel, PaperParams, fit_paper, paper_bounds
from decoder.perf_model.presets import paper_draft_spec, preset_spec

MACHINE = named_machine("2xa800")
RIDGE = MACHINE.ridge_point()


@pytest.fixture(scope="module")
def bounds() -> Bounds:
    name = "qwen2-57b-a14b"
    return paper_bounds(preset_spec(name), paper_draft_spec(name), MACHINE, max_reject=2e-3)


@pytest.fixture(scope="module")
def truth(bounds: Bounds) -> PaperModel:
    low = bounds.low
    params = PaperParams(
        2 * low.bias, 0.05 * low.bias, 1.5 * low.k2, 0.2 * low.bias, 3 * low.draft_bias,
        0.3 * low.draft_bias, 3e-4, 1e-5, 0.5, 1.01,
    )  # fmt: skip
    return PaperModel(params, 64, 8, RIDGE)


def cells(model: PaperModel, noise: float = 0.0) -> list[Observation]:
    random = np.random.default_rng(0)
    grid = [(k, g, b) for k in (1, 2, 4, 8, 16, 32) for g in (2, 4) for b in range(1, 100, 9)]
    return [
        Observation(
            b, g, 0.8, top_k=k,
            speedup=float(model.speedups(b, g, 0.8, k)) * np.exp(noise * random.normal()),
        )
        for k, g, b in grid
    ]  # fmt: skip


def fit(points: list[Observation], bounds: Bounds, **settings):
    return fit_paper(points, bounds, num_experts=64, top_k=8, ridge_point=RIDGE, **settings)


def test_recovers_parameters_up_to_the_common_scale(truth: PaperModel, bounds: Bounds) -> None:
    """Eq. 4 does not change when all times double, so only ratios can come back."""
    data = cells(truth)
    found = fit([data[i] for i in spread_indices(data, 21)], bounds, starts=4)
    assert found.rmse < 1e-6
    want, got = np.array(astuple(truth.params)), np.array(astuple(found.model.params))
    assert got[8:] == pytest.approx(want[8:], rel=1e-3)
    assert got[:8] / got[0] == pytest.approx(want[:8] / want[0], rel=1e-3)
    assert evaluate(found.predict, data).worst < 1e-5
    assert found.identifiability.rank == 9
    assert "bias" in (found.identifiability.warning or "")


def test_held_out_error_under_noise(truth: PaperModel, bounds: Bounds) -> None:
    data = cells(truth, noise=0.02)
    chosen = spread_indices(data, 21)
    found = fit([data[i] for i in chosen], bounds, starts=2)
    rest = evaluate(found.predict, [o for i, o in enumerate(data) if i not in chosen])
    assert rest.count == len(data) - 21
    assert rest.median < 0.03 and rest.p90 < 0.08


def test_bounds_come_from_bytes_and_bandwidth(bounds: Bounds) -> None:
    spec = preset_spec("qwen2-57b-a14b")
    one = 28 * 3 * 3584 * 2560 * 2 / MACHINE.bandwidth  # one expert in all 28 layers
    assert bounds.low.k2 == pytest.approx(one)
    assert bounds.low.bias == pytest.approx(spec.dense_weight_bytes / MACHINE.bandwidth)
    assert bounds.high.bias == pytest.approx(5 * bounds.low.bias)
    assert (bounds.low.ridge_share, bounds.high.ridge_share) == (0.2, 1.0)
    assert (bounds.low.base, bounds.high.base) == (1.0, 2.0)


def test_conventions_and_the_printed_formula(truth: PaperModel) -> None:
    """B * gamma makes gamma = 1 free to verify; B * (gamma + 1) does not; line 11 is bounded."""
    no_draft = replace(truth.params, draft_bias=0.0, draft_k=0.0, reject_bias=0.0, reject_k=0.0)
    model = replace(truth, params=no_draft)
    assert replace(model, convention="paper").speedups(8, 1, 1.0) == pytest.approx(2.0)
    assert model.speedups(8, 1, 1.0) < 1.9
    printed = replace(truth, as_printed=True).speedups(np.arange(1, 101), 4, 0.9)
    assert np.all(printed < 0.9 * 5 / 2)


def test_json_round_trip(truth: PaperModel) -> None:
    assert PaperModel.from_json(truth.to_json()) == truth
    with pytest.raises(ValueError, match="not a paper model"):
        PaperModel.from_json({"params": {"bias": 1.0}})


def test_errors(truth: PaperModel, bounds: Bounds) -> None:
    with pytest.raises(ValueError, match="at least 10 observations with speedup, got 9 of 9"):
        fit(cells(truth)[:9], bounds)
    with pytest.raises(ValueError, match="max_reject must be positive, got 0"):
        paper_bounds(preset_spec("olmoe"), None, MACHINE, max_reject=0)
    with pytest.raises(ValueError, match="bounds of bias must increase"):
        Bounds(bounds.high, bounds.low)


def test_few_similar_points_are_warned_about(truth: PaperModel, bounds: Bounds) -> None:
    same = [o for o in cells(truth) if o.top_k == 8 and o.gamma == 4]
    found = fit(same, bounds, starts=2)
    assert found.identifiability.rank < 8
    assert found.identifiability.warning is not None

"""The structural model: physical limits, recovery from synthetic data, extensions."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from decoder.perf_model.activation import CorrelatedActivation, IidActivation
from decoder.perf_model.fit_report import evaluate
from decoder.perf_model.forward_fit import (
    fit_forward,
    model_from_json,
    model_to_json,
    predict_speedup,
    sensitivities,
)
from decoder.perf_model.forward_model import Adjustments, ForwardModel
from decoder.perf_model.hardware.machine import RowCurve, named_machine
from decoder.perf_model.observations import Observation, d_optimal_indices, spread_indices
from decoder.perf_model.presets import paper_draft_spec, preset_spec
from decoder.perf_model.theory import sigma_from_alpha

H200 = named_machine("h200")


@pytest.fixture(scope="module")
def model() -> ForwardModel:
    name = "qwen2-57b-a14b"
    return ForwardModel(preset_spec(name), named_machine("2xa800"), paper_draft_spec(name))


def measured(truth: ForwardModel, noise: float, times: bool = True) -> list[Observation]:
    random = np.random.default_rng(0)

    def jitter() -> float:
        return float(np.exp(noise * random.normal()))

    cells = []
    for top_k in (2, 4, 8, 16):
        own = truth.with_top_k(top_k)
        for gamma in (2, 4):
            sigma = float(sigma_from_alpha(0.8, gamma))
            for batch in (1, 2, 4, 8, 16, 32, 64, 100):
                t = own.round_times(batch, gamma, 300)
                cell = Observation(
                    batch, gamma, sigma, top_k=top_k, context=300,
                    speedup=own.speedup(batch, gamma, sigma, 300) * jitter(),
                    ar_time=t.ar * jitter(), verify_time=t.verify * jitter(),
                    draft_time=t.draft * jitter(), reject_time=t.reject * jitter(),
                )  # fmt: skip
                none = {f"{n}_time": None for n in ("ar", "verify", "draft", "reject")}
                cells.append(cell if times else replace(cell, **none))
    return cells


TRUE_ADJUST = Adjustments(
    dense_memory=1.3, dense_compute=1.5, expert_memory=1.2, expert_compute=2.0, launch=2.5,
    token=1.4, draft=1.8, reject=1.5,
)  # fmt: skip


def test_forward_time_at_the_limits() -> None:
    """One token reads its active weights; many tokens compute all of them."""
    spec = preset_spec("mixtral-8x7b")
    free = replace(H200, launch=1e-12)
    model = ForwardModel(spec, free, activation=IidActivation(), adjust=Adjustments(token=0.0))
    one = model.forward_time(spec, 1, 1, context=1)
    assert one == pytest.approx(
        (spec.active_params - spec.embedding) * 2 / H200.bandwidth, rel=0.01
    )
    many = 20_000
    compute = 2.0 * many * (spec.active_params - spec.embedding) / H200.peak("bf16")
    assert model.forward_time(spec, many, 1, context=1) == pytest.approx(compute, rel=0.02)


def test_inverted_u_for_moe_and_monotone_for_dense() -> None:
    """Fig. 3 of the paper: target efficiency rises then falls for MoE, only falls for dense."""
    batches = [1, 4, 16, 64, 256, 1024]
    moe = ForwardModel(preset_spec("qwen3-30b-a3b"), H200)
    curve = [moe.target_efficiency(b, 4) for b in batches]
    peak = int(np.argmax(curve))
    assert 0 < peak < len(batches) - 1
    assert curve[peak] > 1.2 * curve[0] and curve[peak] > 1.2 * curve[-1]
    dense = ForwardModel(preset_spec("opt-30b"), H200)
    assert np.all(np.diff([dense.target_efficiency(b, 4) for b in batches]) < 0)


def test_sparser_peaks_later_and_wider() -> None:
    batches = np.unique(np.logspace(0, 3, 40).astype(int))
    peaks, widths = [], []
    for top_k in (4, 16):
        model = ForwardModel(preset_spec("qwen2-57b-a14b").with_top_k(top_k), H200)
        curve = np.array([model.target_efficiency(int(b), 4) for b in batches])
        peaks.append(batches[curve.argmax()])
        wide = batches[curve >= curve.max() / np.sqrt(2)]
        widths.append(np.log(wide[-1] / wide[0]))
    assert peaks[0] > peaks[1]
    assert widths[0] > widths[1]


def test_long_context_keeps_speculation_useful_at_large_batch() -> None:
    """MagicDec's regime: reading the cache dominates, and a verification reads it once."""
    model = ForwardModel(preset_spec("llama-3.1-8b"), H200)
    assert model.target_efficiency(128, 4, 64_000) > 1.2 * model.target_efficiency(128, 4, 256)


def test_correlated_tokens_verify_cheaper(model: ForwardModel) -> None:
    iid = replace(model, activation=IidActivation())
    assert model.target_efficiency(2, 4) > iid.target_efficiency(2, 4)
    assert model.round_times(2, 4).ar == pytest.approx(iid.round_times(2, 4).ar)


def test_recovers_known_parameters(model: ForwardModel) -> None:
    truth = replace(model, adjust=TRUE_ADJUST, sharpness=2.0, activation=CorrelatedActivation(0.7))
    found = fit_forward(model, measured(truth, noise=0.0)[::3], prior_weight=1e-4)
    assert found.rmse < 2e-3
    got = found.model
    for name, want in asdict(TRUE_ADJUST).items():
        assert getattr(got.adjust, name) == pytest.approx(want, rel=0.05), name
    assert got.activation.exponent == pytest.approx(0.7, abs=0.02)  # type: ignore[attr-defined]
    assert got.sharpness == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("times", [True, False], ids=["times", "speedups only"])
def test_held_out_bars_on_21_points(model: ForwardModel, times: bool) -> None:
    """Issue bars on synthetic data with 3 % noise: median 5 %, 90th percentile 12 %."""
    truth = replace(model, adjust=TRUE_ADJUST, sharpness=2.0, activation=CorrelatedActivation(0.7))
    data = measured(truth, noise=0.03, times=times)
    chosen = spread_indices(data, 21)
    found = fit_forward(model, [data[i] for i in chosen])
    rest = [o for i, o in enumerate(data) if i not in chosen]
    error = evaluate(found.predict, rest)
    assert error.median < 0.05 and error.p90 < 0.12
    before = evaluate(lambda o: predict_speedup(model, o), rest)
    assert error.median < before.median


def test_memory_that_drifts_while_measuring_is_accounted_for(model: ForwardModel) -> None:
    """Every other cell was measured while memory gave only 60 %; the cells say so, or do not."""
    fast = measured(model, noise=0.01)
    slow = measured(model.at_memory_speed(0.6), noise=0.01)
    drifting = [
        replace((slow if i % 2 else fast)[i], memory_speed=0.6 if i % 2 else 1.0)
        for i in range(len(fast))
    ]
    cells = drifting[::5]  # of every K, and by turns fast and slow
    told = fit_forward(model, cells)
    untold = fit_forward(model, [replace(o, memory_speed=None) for o in cells])
    error = evaluate(told.predict, drifting)
    assert error.p90 < 0.03
    blind = evaluate(lambda o: untold.predict(replace(o, memory_speed=None)), drifting)
    assert blind.p90 > 2 * error.p90


def test_points_can_be_chosen_before_measuring(model: ForwardModel) -> None:
    data = measured(model, noise=0.0)
    jacobian = sensitivities(model, data)
    assert np.all(np.isfinite(jacobian))
    picked = [data[i] for i in d_optimal_indices(jacobian, 12)]
    assert len({o.batch for o in picked}) >= 4


def test_dense_model_without_draft_has_no_expert_parameters() -> None:
    dense = ForwardModel(preset_spec("llama-3.1-8b"), H200)
    cells = [
        Observation(b, g, 0.6, speedup=1.1 * dense.speedup(b, g, 0.6, 64), context=64)
        for b in (1, 4, 16, 64, 256)
        for g in (2, 4)
    ]
    found = fit_forward(dense, cells)
    assert found.model.adjust.expert_memory == 1.0 and found.model.adjust.draft == 1.0


def test_measured_curves_take_precedence() -> None:
    curve = RowCurve((1.0, 8.0, 64.0), (1e-12, 1.5e-12, 8e-12))
    spec = preset_spec("llama-3.1-8b")
    model = ForwardModel(spec, replace(H200, dense_curve=curve), adjust=Adjustments(token=0.0))
    params = spec.total_params - spec.embedding
    for tokens, seconds in [(1, 1e-12), (8, 1.5e-12), (36, 4.75e-12), (128, 16e-12)]:
        launches = model.forward_time(spec, tokens, 1, context=1) - params * seconds
        assert launches == pytest.approx(32 * 14 * 2.5e-6 + 4 * 2.5e-6, rel=0.05)


def test_json_round_trip(model: ForwardModel) -> None:
    truth = replace(model, adjust=TRUE_ADJUST, sharpness=2.5)
    assert model_from_json(model, model_to_json(truth)) == truth
    with pytest.raises(ValueError, match="not a fitted model"):
        model_from_json(model, {"adjust": {"speed": 1.0}, "sharpness": 1.0})


def test_too_few_points_are_refused(model: ForwardModel) -> None:
    with pytest.raises(ValueError, match="at least 10 observations with speedup, got 3 of 3"):
        fit_forward(model, measured(model, 0.0)[:3])

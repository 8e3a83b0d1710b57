"""The profile file: round trip, use by the controller, and refusal of anything else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from decoder.gamma.auto import AutoGamma
from decoder.perf_model.fit_report import ErrorSummary
from decoder.perf_model.forward_model import Adjustments, ForwardModel
from decoder.perf_model.hardware.machine import RowCurve, named_machine
from decoder.perf_model.paper_model import PaperModel, PaperParams
from decoder.perf_model.presets import paper_draft_spec, preset_spec
from decoder.perf_model.profile import Profile, load_profile


@pytest.fixture
def profile() -> Profile:
    curve = RowCurve((1.0, 16.0), (1e-12, 2e-12))
    machine = replace(named_machine("h200"), expert_curve=curve)
    model = ForwardModel(
        preset_spec("olmoe"), machine, paper_draft_spec("olmoe"),
        adjust=Adjustments(dense_memory=1.2, draft=1.5), sharpness=2.2,
    )  # fmt: skip
    params = PaperParams(1e-3, 1e-4, 1e-5, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 0.5, 1.01)
    return Profile(
        model=model, points=21, held_out=ErrorSummary(40, 0.03, 0.07, 0.2, 0.01), context=300,
        paper=PaperModel(params, 64, 8, 180.0), warnings=("one",), environment={"commit": "x"},
    )  # fmt: skip


def test_round_trip(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    loaded = load_profile(path)
    assert loaded == profile
    assert loaded.round_cost(8, 4, 300) == profile.round_cost(8, 4, 300)


def test_controller_takes_its_costs(profile: Profile) -> None:
    """At the first round already: no start-up measurement, gamma from the model."""
    controller = AutoGamma(8, costs=profile.round_cost, acceptance_prior=0.9)
    assert controller.choose(16, 300) >= 2
    assert "x plain decoding" in controller.explain()


def test_round_cost_is_cached_by_context_octave(profile: Profile) -> None:
    assert profile.round_cost(8, 4, 257) == profile.round_cost(8, 4, 512)
    assert profile.round_cost(8, 4, 513) > profile.round_cost(8, 4, 512)


def test_other_target_is_refused(profile: Profile) -> None:
    profile.check_target(preset_spec("olmoe"))
    with pytest.raises(ValueError, match=r"profile is of 'olmoe' .* got a target 'opt-350m'"):
        profile.check_target(preset_spec("opt-350m"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "moesd-profile/0"}, "schema must be 'moesd-profile/1', got 'moesd-profile/0'"),
        ({"schema": None}, "got None"),
        ({"points": 9}, "at least 10 points, got 9"),
        ({"machine": {"name": "x"}}, "not a machine description"),
        ({"target": {}}, "not a model spec"),
        ({"improved": {"adjust": {}}}, "not a fitted model"),
        ({"improved": {"adjust": 3, "sharpness": 2}}, "not a fitted model"),
        ({"held_out": {"count": 3}}, "missing"),
        ({"paper": {}}, "not a paper model"),
    ],
)
def test_malformed_profiles_are_refused(
    profile: Profile, tmp_path: Path, change: dict, message: str
) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_profile(path)
    assert "profile.json is not a usable profile" in str(caught.value)


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        load_profile(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="schema must be 'moesd-profile/1', got 'list'"):
        load_profile(path)
    path.write_text('{"schema": "moesd-profile/1"}')
    with pytest.raises(ValueError, match="missing 'machine'"):
        load_profile(path)

"""The planner: its arithmetic, its command line, and how wrong it is known to be."""

import json
from pathlib import Path

import numpy as np
import pytest

from decoder import embedded
from decoder.__main__ import main
from decoder.cli import plan as cli
from decoder.perf_model.fit_report import ErrorSummary
from decoder.perf_model.forward_model import ForwardModel
from decoder.perf_model.hardware.machine import named_machine
from decoder.perf_model.paper_tables import paper_cells
from decoder.perf_model.planning.notes import ZERO_MEASUREMENT_MEDIAN
from decoder.perf_model.planning.planner import make_plan
from decoder.perf_model.presets import paper_draft_spec, preset_config, preset_spec
from decoder.perf_model.profile import Profile
from decoder.perf_model.theory import expected_tokens


def run(*arguments: str) -> int:
    return main(["plan", *arguments])


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def model() -> ForwardModel:
    name = "qwen2-57b-a14b"
    return ForwardModel(preset_spec(name), named_machine("h200"), paper_draft_spec(name))


def test_cells_agree_with_equation_4(model: ForwardModel) -> None:
    plan = make_plan(model, alpha=0.8, batches=[8], gammas=[4], context=512)
    plain, cell = plan.batches[0].cells
    times = model.round_times(8, 4, 512)
    speedup = float(expected_tokens(0.8, 4)) * times.ar_step / times.round(4)
    assert cell.speedup == pytest.approx(speedup)
    assert cell.target_efficiency == pytest.approx(times.ar / times.verify)
    assert cell.tokens_per_second == pytest.approx(speedup * plain.tokens_per_second)
    assert cell.break_even_alpha is not None
    even = make_plan(model, alpha=cell.break_even_alpha, batches=[8], gammas=[4], context=512)
    assert even.batches[0].cells[1].speedup == pytest.approx(1.0, abs=1e-6)


def test_gamma_0_is_best_when_acceptance_is_low(model: ForwardModel) -> None:
    plan = make_plan(model, alpha=0.05, batches=[1, 8, 64], gammas=range(9), context=512)
    assert [entry.best.gamma for entry in plan.batches] == [0, 0, 0]
    assert plan.pays == ()


def test_paying_ranges_can_have_gaps(model: ForwardModel) -> None:
    """At modest acceptance small batches load extra experts; medium ones do not; huge compute."""
    batches = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    plan = make_plan(model, alpha=0.35, batches=batches, gammas=[2, 4], context=512)
    paying = {b for low, high in plan.pays for b in batches if low <= b <= high}
    for entry in plan.batches:
        assert (entry.batch in paying) == (entry.best.speedup >= 1.02)
    assert paying and paying != set(batches)


def test_zero_measurement_error_against_the_paper_is_as_stated() -> None:
    """Best speedup over the paper's batch sizes, at its sigma, against its 60 measured peaks."""
    batches = (1, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 60, 100)
    models: dict[tuple[str, str], ForwardModel] = {}
    errors = []
    for cell in paper_cells():
        key = (cell.target, cell.machine)
        if key not in models:
            draft = paper_draft_spec(cell.target)
            models[key] = ForwardModel(preset_spec(key[0]), named_machine(key[1]), draft)
        best = max(models[key].speedup(b, cell.gamma, cell.sigma, 400) for b in batches)
        errors.append(best / cell.speedup - 1.0)
    assert np.median(errors) == pytest.approx(ZERO_MEASUREMENT_MEDIAN, abs=0.02)
    assert min(errors) > 0  # an upper estimate for all 60


def test_cli_prints_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", "qwen3-30b-a3b", "--machine", "h200", "--batch-sizes", "1..64"]
    assert run(*arguments, "--gammas", "1..4", "--alpha", "0.7") == 0
    out = capsys.readouterr().out
    for piece in ("Best draft length", "Speedup over plain", "Target efficiency", "break-even"):
        assert piece in out
    assert "Speculation pays" in out and "zero-measurement" in out
    assert "47 independent tokens" in out.replace("\n", " ")


def test_cli_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(
        capsys, "--target", "deepseek-v3", "--machine", "8xb200", "--batch-sizes", "1,16"
    )
    assert [entry["batch"] for entry in data["batches"]] == [1, 16]
    assert len(data["batches"][0]["cells"]) == 9
    assert data["error"] is None and data["basis"].startswith("zero-measurement")
    assert {"best_gamma", "best_speedup", "active_share"} <= set(data["batches"][0])


def test_cli_reads_config_json_and_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "my-mixtral"
    folder.mkdir()
    preset_config("mixtral-8x7b").to_json_file(folder / "config.json")
    common = ("--machine", "h200", "--batch-sizes", "8", "--draft", "eagle")
    by_name = run_json(capsys, "--target", "mixtral-8x7b", *common)
    for path in (folder, folder / "config.json"):
        data = run_json(capsys, "--target", str(path), *common)
        assert data["target"] == "my-mixtral"
        assert data["batches"][0]["cells"] == by_name["batches"][0]["cells"]


def test_cli_knows_the_built_in_models(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--machine", "h200", "--batch-sizes", "8")
    by_name = run_json(capsys, "--target", "embedded", *common)
    target, draft = str(embedded.target_path()), str(embedded.draft_path())
    by_path = run_json(capsys, "--target", target, "--draft", draft, *common)
    assert by_name["target"] == "embedded"
    assert by_name["batches"] == by_path["batches"]


def test_cli_options_change_the_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--target", "olmoe", "--machine", "h100", "--batch-sizes", "4", "--gammas", "4")

    def speedup(*extra: str) -> float:
        return run_json(capsys, *base, *extra)["batches"][0]["cells"][1]["speedup"]

    plain = speedup()
    assert speedup("--draft", "none") > plain
    assert speedup("--independent-experts") < plain
    assert speedup("--top-k-experts", "2") != plain
    assert speedup("--launch-us", "20") != plain
    assert speedup("--alpha", "0.5") < plain
    by_bits = [speedup("--dtype", name) for name in ("bf16", "q8_0", "int4")]
    assert len({*by_bits}) == 3 and by_bits[0] == plain
    assert speedup("--dtype", "fp8") != plain
    assert speedup("--context", "8000") != plain


def test_cli_with_a_profile_states_its_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: ForwardModel
) -> None:
    path = tmp_path / "profile.json"
    held_out = ErrorSummary(100, 0.031, 0.08, 0.2, 0.01)
    Profile(model=model, points=21, held_out=held_out, context=512).save(path)
    data = run_json(capsys, "--machine", str(path), "--batch-sizes", "8")
    assert data["target"] == "qwen2-57b-a14b" and data["error"] == 0.08
    assert "21 measured points" in data["basis"] and "3.1%" in data["basis"]
    assert run("--machine", str(path), "--batch-sizes", "8") == 0
    assert "± 8 %" in capsys.readouterr().out.replace("8%", "8 %")
    assert run("--machine", str(path), "--target", "olmoe") == 2
    assert "profile is of 'qwen2-57b-a14b'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--machine", "h200"], "--target is needed"),
        (["--target", "opt-31b", "--machine", "h200"], "unknown preset 'opt-31b'"),
        (["--target", "olmoe", "--machine", "h300"], "machine must be one of"),
        (["--target", "missing.json", "--machine", "h200"], "no such file"),
        (["--target", "olmoe", "--machine", "h200", "--batch-sizes", "a"], "expected numbers"),
        (["--target", "olmoe", "--machine", "h200", "--gammas", "4..1"], "must increase"),
        (["--target", "olmoe", "--machine", "h200", "--batch-sizes", "0"], "at least 1"),
        (["--target", "olmoe", "--machine", "h200", "--alpha", "1.5"], "alpha must lie in"),
        (["--target", "olmoe", "--machine", "no.json"], "no.json"),
    ],
)
def test_cli_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_ranges() -> None:
    assert cli.parse_range("1..256", doubling=True) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert cli.parse_range("3..20", doubling=True) == [3, 6, 12, 20]
    assert cli.parse_range("0..3,8") == [0, 1, 2, 3, 8]
    assert cli.parse_range("5") == [5]


def test_memory_notes() -> None:
    h200 = named_machine("h200")
    large = ForwardModel(preset_spec("deepseek-v3"), h200)
    plan = make_plan(large, alpha=0.8, batches=[1, 8], gammas=[2], context=512)
    assert any("do not fit the 141 GB" in note for note in plan.notes)
    tight = ForwardModel(preset_spec("mixtral-8x7b"), h200)
    plan = make_plan(tight, alpha=0.8, batches=[1, 256], gammas=[2], context=8192)
    assert any("fit for about" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("batches", "gammas", "message"),
    [
        ([], [1], "batch sizes must be at least one, got none"),
        ([2**20 + 1], [1], "batch sizes must be at least 1 and at most 1048576, got 1048577"),
        ([1], [-1], "gammas must be at least 0 and at most 1024, got -1"),
        ([1], [0], "gammas must have one that drafts, got 0 alone"),
        ([1], [10**30], "gammas must be at least 0 and at most 1024"),
        (range(1, 100), range(100), "at most 4096 cells, got 99 x 100"),
    ],
)
def test_a_grid_is_bounded(
    model: ForwardModel, batches: list[int], gammas: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(model, alpha=0.8, batches=batches, gammas=gammas, context=512)


def test_a_range_is_refused_before_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"may have 4096 values, got '0\.\.1000000000000'"):
        cli.parse_range("0..1000000000000")


def test_a_dense_model_has_no_top_k(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--target", "opt-30b", "--machine", "h200", "--top-k-experts", "2") == 2
    assert "--top-k-experts needs a model with experts" in capsys.readouterr().err

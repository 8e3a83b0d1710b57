"""Cells, fit, predict, pictures and report on synthetic measurements with a known model behind."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.__main__ import main
from bench.measure.record import Recorder
from bench.pictures.style import INK
from bench.runs.cells import load_cells, setup_fields
from bench.runs.fitting import DESIGNS, best_gammas, fit_cells
from bench.workloads.models import RANDOM, draft_like, moe_310m
from decoder.perf_model.config_spec import spec_from_config
from decoder.perf_model.forward_model import Adjustments, ForwardModel
from decoder.perf_model.hardware.machine import named_machine
from decoder.perf_model.observations import Observation
from decoder.perf_model.profile import load_profile
from decoder.perf_model.theory import active_experts, sigma_from_alpha

ALPHA = 0.9


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """52 cells of a machine that is 1.4 times slower at experts than it claims."""
    path = tmp_path_factory.mktemp("decode") / "lines.jsonl"
    recorder = Recorder(path)
    machine = named_machine("h200")
    for top_k in (1, 8):
        config = moe_310m(num_experts_per_tok=top_k)
        target, draft = spec_from_config(config), spec_from_config(draft_like(config))
        truth = ForwardModel(target, machine, draft, adjust=Adjustments(expert_memory=1.4))
        setup = setup_fields(target, draft, machine, "bf16")
        for gamma in (2, 4):
            sigma = float(sigma_from_alpha(ALPHA, gamma))
            for batch in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64):
                times = truth.round_times(batch, gamma, 64)
                recorder.write(
                    "decode",
                    target="moe-310m",
                    top_k=top_k,
                    batch=batch,
                    gamma=gamma,
                    context=64,
                    sigma=sigma,
                    ar_time=times.ar,
                    verify_time=times.verify,
                    draft_time=times.draft,
                    reject_time=times.reject,
                    target_efficiency=times.ar / times.verify,
                    speedup=truth.speedup(batch, gamma, sigma, 64),
                    experts_ar=float(active_experts(batch, 64, top_k)),
                    experts_verify=float(active_experts(batch * (gamma + 1), 64, top_k)),
                    **setup,
                )
    return path


@pytest.mark.parametrize("design", DESIGNS)
def test_the_fit_predicts_cells_it_has_not_seen(lines, design):
    (cells,) = load_cells([lines])
    fits = fit_cells(cells, 21, design)
    # A stride of ceil(52 / 21) = 3 leaves 18 cells.
    assert len(fits.fitted) == (18 if design == "stride" else 21)
    assert len(fits.fitted) + len(fits.held_out) == 52
    errors = fits.errors()
    assert errors["improved"].median < 0.01
    assert errors["improved"].median <= errors["zero"].median
    assert set(errors) == {"paper", "improved", "zero"}


def test_fit_writes_a_profile_and_predict_reads_it(lines, tmp_path, capsys):
    profile, out = tmp_path / "profile.json", tmp_path / "out.jsonl"
    assert main(["fit", str(lines), "--profile", str(profile), "--out", str(out)]) == 0
    assert load_profile(profile).held_out.median < 0.01
    assert main(["predict", str(lines), "--profile", str(profile)]) == 0
    assert "median" in capsys.readouterr().out
    assert {json.loads(text)["model"] for text in out.read_text().splitlines()} == {
        "paper",
        "improved",
        "zero",
    }


def test_pictures_come_from_lines_alone(lines, tmp_path):
    assert main(["plot", str(lines), "--out", str(tmp_path)]) == 0
    names = {path.name.split("-")[0] for path in tmp_path.glob("*.png")}
    assert {"speedup", "target", "predicted", "activation", "map"} <= names


def test_the_page_asks_each_question_that_the_lines_answer(lines, tmp_path):
    assert main(["report", str(lines.parent), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    asked = re.findall("<figure><h3>(.*?)</h3>", page)
    assert asked == [
        "When does speculation pay?",
        "How nearly free is verification?",
        "Does the model predict it?",
        "How many experts does a step load?",
    ]
    assert page.count("<svg") == len(asked)
    assert INK not in page and "currentColor" in page
    assert "<code><span>python</span> <span>-m</span> <span>bench</span>" in page


def test_too_few_points_is_one_clear_line(lines, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(lines.read_text().splitlines()[:5]))
    assert main(["fit", str(few), "--points", "5"]) == 2
    assert "at least 10" in capsys.readouterr().err


def test_no_lines_is_one_clear_line(tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert main(["plot", str(empty), "--out", str(tmp_path)]) == 2
    assert "no lines of kind" in capsys.readouterr().err


def test_following_the_predicted_gamma_costs_what_was_measured():
    measured = {
        (1, 8): {1: 1.2, 2: 1.4, 4: 1.3},
        (2, 8): {1: 0.9, 2: 0.8, 4: 0.6},
        (1, 1): {2: 2.0},
    }
    cells = [
        Observation(batch=batch, gamma=gamma, sigma=0.9, speedup=speedup, top_k=top_k)
        for (top_k, batch), row in measured.items()
        for gamma, speedup in row.items()
    ]
    choices = best_gammas(lambda o: 0.9 + 0.1 * o.gamma, cells)  # believes in long drafts
    assert [(c.top_k, c.batch, c.measured, c.predicted) for c in choices] == [
        (1, 8, 2, 4),
        (2, 8, 0, 4),
    ]  # one gamma alone is no choice
    assert choices[0].loss == pytest.approx(1 - 1.3 / 1.4)
    assert choices[1].loss == pytest.approx(1 - 0.6)


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_model_has_the_size_that_its_name_says(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(RANDOM[name]())
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert abs(million - int(name.rpartition("-")[2].removesuffix("m"))) < 16

"""A trained pair on the paper's grid: what is measured, what is left alone, what is said of it."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bench.__main__ import main
from bench.measure.record import Recorder, read_lines
from bench.paper import grid
from bench.paper.beside import rows_of, runs_of
from bench.paper.identity import file_identity
from bench.runs.cells import group_cells, load_cells, setup_fields, setup_of
from bench.workloads.trained import TrainedPair
from decoder.perf_model.config_spec import spec_from_config
from decoder.perf_model.hardware.machine import named_machine


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    functions = [f"def f{i}(x):\n" for i in range(3)]
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in functions)
    turns = [json.dumps({"turns": [f"What is {i}?", "Why?"]}) for i in range(3)]
    (folder / "mt_bench.jsonl").write_text("\n".join(turns))
    return folder


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine described without being measured."""

    def described(subject: Any, *_: Any) -> dict[str, Any]:
        specs = spec_from_config(subject.target.config), spec_from_config(subject.draft.config)
        return setup_fields(*specs, named_machine("h200"), "fp32")

    monkeypatch.setattr(grid, "describe_subject", described)
    probe = Mock(read=Mock(return_value=1e10))
    monkeypatch.setattr(grid, "CeilingProbe", Mock(return_value=probe))


def paper(out: Path, prompts: Path, **changes: str) -> int:
    flags = {
        "preset": "embedded", "prompts-dir": str(prompts), "batch-sizes": "2", "gammas": "2,3",
        "new-tokens": "12", "rounds": "2", "dtype": "float32", "device": "cpu", "out": str(out),
    }  # fmt: skip
    flags |= {name.replace("_", "-"): value for name, value in changes.items()}
    return main(
        ["paper", *(word for name, value in flags.items() for word in (f"--{name}", value))]
    )


def cells(out: Path) -> list[tuple[Any, ...]]:
    names = ("data", "temperature", "batch", "gamma")
    return [tuple(line[name] for name in names) for line in read_lines([out], "trained")]


def test_a_run_that_was_cut_off_measures_what_is_missing(
    tmp_path, prompts, machine, monkeypatch, capsys
):
    out = tmp_path / "lines.jsonl"
    assert paper(out, prompts) == 0
    measured = cells(out)
    everything = {(d, t, 2, g) for d in ("humaneval", "mt_bench") for t in (0, 1) for g in (2, 3)}
    assert len(measured) == 8 and set(measured) == everything
    for line in read_lines([out]):
        assert line["identical"] is (True if line["temperature"] == 0 else None)
        assert 0 < line["alpha"] < 1 and line["decided"] > 0 and line["predicted_speedup"] > 0
    # Cut off in the middle of the last batch's lines, then whole.
    text = out.read_text().splitlines(keepends=True)
    out.write_text("".join(text[:-1]))
    assert paper(out, prompts) == 0
    assert cells(out) == measured
    monkeypatch.setattr(TrainedPair, "load_target", lambda *_: pytest.fail("nothing is missing"))
    capsys.readouterr()
    assert paper(out, prompts) == 0
    table = capsys.readouterr().out
    assert "0.93" in table and "1.96" in table, "the paper's row of HumanEval, T = 0, gamma = 3"
    (group,) = load_cells([out])
    assert len(group.observations) == 8 and len(group.by_text()) == 4
    lines = list(read_lines([out]))
    assert {line["draft_format"] for line in lines} == {"plain"}
    packed = [line | {"draft_format": "q4_1"} for line in lines]
    assert len(group_cells([*lines, *packed])) == 2, "drafts of other costs are fitted apart"


def test_coupled_outputs_are_the_targets_own(tmp_path, prompts, machine):
    out = tmp_path / "lines.jsonl"
    wanted = {"temperatures": "1", "datasets": "mt_bench", "gammas": "2", "verifier": "coupled"}
    assert paper(out, prompts, **wanted) == 0
    (line,) = read_lines([out])
    assert line["identical"] is True and line["verifier"] == "coupled"


def test_an_unknown_data_set_is_one_clear_line(tmp_path, prompts, capsys):
    assert paper(tmp_path / "none.jsonl", prompts, datasets="humaneval,gsm8k") == 2
    assert "gsm8k" in capsys.readouterr().err


def line(batch: int, gamma: int, speedup: float, **fields: Any) -> dict[str, Any]:
    values = {"target": "smol", "drafter": "independent", "data": "humaneval", "temperature": 0}
    values |= {"sigma": 0.9, "alpha": 0.8, "decided": 10, "target_efficiency": 0.7}
    values |= {"predicted_speedup": speedup + 0.1, "env": {"device": "A CPU"}}
    return values | fields | {"batch": batch, "gamma": gamma, "speedup": speedup}


def test_a_row_is_the_best_batch_beside_the_papers():
    lines = [
        line(1, 4, 1.2, alpha=0.5, decided=30, sigma=0.6),
        line(32, 4, 2.4, alpha=0.9, decided=10),
        line(8, 4, 2.0, drafter="eagle"),
        line(32, 7, 9.9),
    ]
    runs = runs_of([line(1, 4, 7.0), *lines])  # measured again: the last counts
    assert [run.drafter for run in runs] == ["independent", "eagle"]
    best, beyond = rows_of(next(iter(runs.values())))
    assert (best.batch, best.speedup, best.predicted) == (32, 2.4, 2.5)
    assert best.alpha == pytest.approx((0.5 * 30 + 0.9 * 10) / 40)
    assert best.sigma == pytest.approx((0.6 + 32 * 0.9) / 33)
    assert (best.paper_sigma, best.paper_speedup) == (0.91, 2.18)
    assert (beyond.gamma, beyond.paper_sigma) == (7, None), "the paper has no such row"


def test_a_whole_data_set_keeps_the_targets_own_outputs(tmp_path, prompts):
    out = tmp_path / "lines.jsonl"
    flags = [f"--prompts-dir={prompts}", "--new-tokens=10", "--batch-size=2", f"--out={out}"]
    flags += ["--gamma=2", "--temperature=1", "--dtype=float32", "--device=cpu"]
    assert main(["compare", "--preset=embedded", "--datasets=mt_bench", *flags]) == 0
    (line,) = read_lines([out], "compare")
    assert (line["identical"], line["sequences"], line["verifier"]) == (3, 3, "coupled")
    assert 0 <= line["alpha"] < 1 and line["ratio"] > 0 and line["data"] == "mt_bench"


@pytest.mark.parametrize("drafter", ["eagle", "ngram"])
def test_our_loop_and_transformers_write_the_same(tmp_path, prompts, drafter):
    out = tmp_path / "lines.jsonl"
    flags = ["--batch-sizes=2", "--new-tokens=10", "--gamma=2", "--rounds=1", f"--out={out}"]
    flags += [f"--prompts-dir={prompts}", "--dtype=float32", "--device=cpu"]
    assert main(["generate", "--preset=embedded", f"--drafter={drafter}", *flags]) == 0
    lines = list(read_lines([out], "generate"))
    assert [line["variant"] for line in lines] == ["ours", "ours speculative", "transformers"]
    assert all(line["identical_to_ours"] == 2 for line in lines)
    assert {line["drafter"] for line in lines} == {drafter}


def test_automatic_gamma_on_real_prompts(tmp_path, prompts):
    out = tmp_path / "lines.jsonl"
    flags = ["--batch-sizes=2", "--new-tokens=6", "--gammas=1,2", "--rounds=1", f"--out={out}"]
    flags += [f"--prompts-dir={prompts}", "--dtype=float32", "--device=cpu", "--drafter=ngram"]
    assert main(["auto", "--preset=embedded", "--datasets=humaneval", *flags]) == 0
    (line,) = read_lines([out], "auto")
    assert (line["data"], line["alpha"], line["target"]) == ("humaneval", None, "embedded")
    assert set(line["seconds"]) == {"0", "0 again", "1", "2", "auto"}


def model(folder: Path, weights: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_lines_of_an_architecture_are_found_for_their_models_and_prompts_only(
    tmp_path, prompts, monkeypatch
):
    mine, tuned = (model(tmp_path / name / "moe", name.encode()) for name in ("mine", "fine"))
    draft, packed = (model(tmp_path / name / "dense", name.encode()) for name in ("half", "four"))
    others = tmp_path / "others"
    others.mkdir()
    (others / "mt_bench.jsonl").write_text(json.dumps({"turns": ["Why?"]}))
    of = lambda folder: grid.Grid(["mt_bench"], [0], [1], [4], "standard", 8, 1, folder)
    recorder = Recorder(tmp_path / "lines.jsonl")
    place = {"data": "mt_bench", "temperature": 0, "batch": 1, "gamma": 4}
    pair = TrainedPair("qwen2-57b-a14b", "independent", mine, draft)
    same = grid._run_fields(pair, of(prompts), torch.bfloat16)
    digest = file_identity(prompts / "mt_bench.jsonl")
    line = recorder.write("trained", **same, **place, prompts=digest)
    assert str(tmp_path) not in json.dumps({**line, "env": None})
    monkeypatch.setattr(TrainedPair, "load_tokenizer", Mock(side_effect=LookupError))

    def found(pair: TrainedPair, folder: Path = prompts) -> bool:
        try:
            return bool(grid.measure_grid(pair, of(folder), recorder, torch.bfloat16, "cpu"))
        except LookupError:  # it is to be measured
            return False

    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write('{"kind": "trai')
    assert found(pair), "half a line behind it does no harm"
    assert found(replace(pair, target=shutil.copytree(mine, tmp_path / "moved" / "moe")))
    assert found(pair, tmp_path), "shown where the data set is not at hand"
    assert not found(replace(pair, target=tuned))
    assert not found(replace(pair, draft=packed)) and not found(replace(pair, draft=None))
    assert not found(pair, others)
    assert len(runs_of([line | {"target_files": "moe 1", "env": {"device": "A"}}, line])) == 2
    assert len({setup_of(line), setup_of(line | {"draft_files": "dense 1"})}) == 2


RESULTS = Path(__file__).parents[3] / "bench" / "results"


@pytest.mark.parametrize("file", ["xeon-gnr-2c/smol/paper.jsonl", "epyc-zen4-2c/smol/paper.jsonl"])
def test_committed_lines_of_a_preset_are_found(file, tmp_path, monkeypatch):
    lines = list(read_lines([RESULTS / file], "trained"))
    monkeypatch.setattr(TrainedPair, "load_tokenizer", lambda *_: pytest.fail("none is missing"))
    recorder = Recorder(RESULTS / file)
    recorder.environment["device"] = lines[0]["env"]["device"]
    pair = TrainedPair("smol", "independent", tmp_path, tmp_path)
    one = lambda name: sorted({line[name] for line in lines})
    tokens, rounds = one("new_tokens")[0], one("repetitions")[0]
    plan = grid.Grid(
        one("data"), one("temperature"), one("batch"), one("gamma"), one("verifier")[0],
        tokens, rounds, tmp_path,
    )  # fmt: skip
    found = grid.measure_grid(pair, plan, recorder, torch.bfloat16, "cpu")
    assert found and all(line in lines for line in found)

"""Flags that a command cannot follow: one clear line before anything is loaded or measured."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bench.__main__ import main
from bench.measure.fields import FIELDS
from bench.workloads import models
from bench.workloads.trained import TrainedPair


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse: Any = Mock(side_effect=AssertionError("a model was loaded"))
    for name in ("random_model", "load_model"):
        monkeypatch.setattr(models, name, refuse)
    for name in ("load_target", "load_tokenizer"):
        monkeypatch.setattr(TrainedPair, name, refuse)
    monkeypatch.setattr("bench.runs.generate.random_model", refuse)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("generate --draft D", "--draft D"),
        ("generate --drafter ngram", "--drafter ngram"),
        ("generate --prompts humaneval", "--prompts humaneval"),
        ("generate --preset embedded --draft D", "--draft D"),
        ("generate --target T --draft D --alpha 0.9", "--draft D"),
        ("auto --drafter ngram", "--drafter ngram"),
        ("paper --draft D", "--draft D"),
        ("paper --drafter ngram", "--drafter ngram"),
        ("paper --preset embedded --target T", "--target T"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(command, said, capsys):
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("decode --gammas 0,2", "--gammas"),
        ("decode --batch-sizes 0", "--batch-sizes"),
        ("decode --rounds 0", "--rounds"),
        ("decode --new-tokens 1", "--new-tokens"),
        ("decode --prompt-tokens 0", "--prompt-tokens"),
        ("decode --top-k 0", "--num-experts-per-token/--top-k"),
        ("decode --dtype bf17", "--dtype"),
        ("decode --threads 0", "--threads"),
        ("kernels --threads 100000", "--threads"),
        ("roofline --threads -1", "--threads"),
        ("paper --temperatures 0,x", "--temperatures"),
        ("paper --gammas 4,0", "--gammas"),
        ("paper --new-tokens 1", "--new-tokens"),
        ("generate --gamma x", "--gamma"),
        ("generate --rounds 0", "--rounds"),
        ("auto --gammas 0", "--gammas"),
        ("auto --batch-sizes 1,x", "--batch-sizes"),
        ("compare --gamma -1", "--gamma"),
        ("compare --batch-size 0", "--batch-size"),
        ("kernels --batch-sizes 0", "--batch-sizes"),
        ("tune --shape olmoe --tokens 0", "--tokens"),
        ("tune --shape olmoe --dtype fp32", "--dtype"),
        ("kernels --device cuda:9", "--device"),
        ("decode --device gpu", "--device"),
        ("generate --threads 0", "--threads"),
        ("roofline --device cuda:9", "--device"),
    ],
)
def test_a_value_that_cannot_be_measured_is_refused(command, flag, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {flag}: " in said


def test_a_gpus_minutes_are_not_begun_without_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["suite", "--out", str(tmp_path / "out")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["kernels --gammas 0,4", "generate --gamma 0,auto"])
def test_no_draft_is_a_length_where_steps_are_measured_alone(flag):
    command, name, value = flag.split()
    parser = argparse.ArgumentParser()
    importlib.import_module(f"bench.commands.{command}").add_arguments(parser)
    found = vars(parser.parse_args([name, value]))[name.removeprefix("--")]
    assert list(map(str, found)) == value.split(",")


@pytest.mark.parametrize("command", ["decode", "generate", "compare", "auto", "paper", "kernels"])
@pytest.mark.parametrize("spelling", ["bf16", "bfloat16"])
def test_numbers_are_called_as_elsewhere(command, spelling):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"bench.commands.{command}").add_arguments(parser)
    assert parser.parse_args(["--dtype", spelling]).dtype == "bfloat16"


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("command", ["fit", "predict", "plot", "report"])
def test_a_line_that_lacks_its_fields_is_named(command, kind, tmp_path, capsys):
    (tmp_path / "lines.jsonl").write_text(json.dumps({"kind": kind}))
    out = ["--out", str(tmp_path / "out")] if command == "plot" else []
    assert main([command, str(tmp_path), *out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"a {kind} line needs" in error or "no decode lines" in error or "no lines of" in error


def test_a_folder_in_place_of_a_file_is_one_clear_line(tmp_path, capsys):
    results = Path(__file__).parents[3] / "bench" / "results" / "epyc-zen4-2c" / "gammas"
    assert main(["predict", str(results), "--profile", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_gpu_that_is_named_is_the_current_one(monkeypatch):
    """Events, streams and graphs of timers are of that one."""
    made_current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setattr("bench.commands.roofline.run", lambda args: None)
    assert main(["roofline", "--device", "cuda:1"]) == 0
    assert made_current == ["cuda:1"]


def test_a_device_that_is_not_here_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["roofline", "--device", "cuda:7"])
    assert "CUDA device of this machine" in capsys.readouterr().err

"""Flags that a command cannot follow: one clear line before anything is loaded or measured."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from bench.__main__ import main
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

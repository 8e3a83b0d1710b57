"""The recipe's command line."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from training import __main__ as stages

NOTHING_TO_RUN_ON = "expected a CUDA device of this machine, which has 0, got 'cuda'"


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("training", "all --minutes -1", "expected a number in"),
        ("training", "target --tokens 0", "expected an integer >= 1, got '0'"),
        ("training", "data --threads 0", "expected an integer >= 1, got '0'"),
        ("training", "evaluate --device cuda", NOTHING_TO_RUN_ON),
        ("training.upcycle", "all --minutes 0", "expected a number in"),
        ("training.upcycle", "target --device cuda", NOTHING_TO_RUN_ON),
        ("training.upcycle.card", "--windows 1", "expected an integer >= 2, got '1'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    module: str,
    words: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as refused:
        importlib.import_module(f"{module}.__main__").main(words.split())
    assert refused.value.code == 2
    assert said in capsys.readouterr().err


def test_a_pair_is_evaluated_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("training.teacher.load_teacher", lambda path, device: asked.append(device))
    monkeypatch.setattr("training.teacher.load_writer", lambda path, device: asked.append(device))
    monkeypatch.setattr("training.evaluate.evaluate", lambda *parts: {})
    monkeypatch.setattr(stages, "load_tokens", lambda run_dir: (None, None))
    monkeypatch.setattr(stages.flag, "device", str)
    monkeypatch.setattr(stages, "keep_freed_memory", lambda: None)
    assert stages.main(["evaluate", "--device", "cuda", "--run-dir", str(tmp_path)]) == 0
    assert asked == ["cuda", "cuda"]

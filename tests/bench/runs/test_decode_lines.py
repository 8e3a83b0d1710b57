"""What a line says of the target's and the draft's weights: the bytes that they are kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import tiny_model
from support.tiny_smol import LAYERS, H, I, tiny_llama, vocabulary, write_gguf

from bench.runs import automatic, decode_lines
from bench.runs.automatic import measure_automatic
from bench.runs.cells import group_cells
from bench.runs.decode import measure_batch
from bench.runs.decode_lines import cell_fields, describe_subject, draft_spec
from bench.runs.subject import Subject
from bench.workloads.kept import weight_format
from decoder.model import kernels
from decoder.model.loading import load_model
from decoder.perf_model.config_spec import spec_from_config
from decoder.perf_model.hardware.machine import named_machine
from decoder.perf_model.model_spec import WEIGHT_BYTES, ModelSpec
from moesd_kernels import accelerate, quantize

ATTENTION, HEAD = LAYERS * 3 * H * H, len(vocabulary()[0]) * H
MLPS = LAYERS * 3 * H * I


def test_blocks_of_a_file(tmp_path):
    pytest.importorskip("gguf", reason="the file is written with it")
    dense = tiny_llama()
    target = spec_from_config(dense.config)
    write_gguf(tmp_path / "tiny.gguf", dense, "Q4_1")
    draft = load_model(tmp_path / "tiny.gguf", device="cpu")
    expected = 2 * ATTENTION + WEIGHT_BYTES["q4_1"] * (MLPS + HEAD)
    for model in (draft, accelerate(draft)):
        assert draft_spec(model, target).dense_weight_bytes == pytest.approx(expected)


def test_integers_and_plain_weights():
    dense = tiny_llama().bfloat16()
    target = spec_from_config(dense.config)
    assert draft_spec(dense, target) == target
    assert draft_spec(quantize(dense, "int8"), target).dense_bytes == WEIGHT_BYTES["int8"]


@pytest.fixture
def packed(tmp_path: Path) -> Any:
    """A dense draft in four bits."""
    pytest.importorskip("gguf", reason="the file is written with it")
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), "Q4_1")
    return load_model(tmp_path / "tiny.gguf", device="cpu")


def described(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(decode_lines, "machine_with_kernels", lambda *_: named_machine("h200"))
    return describe_subject(subject, "cpu")


def test_a_files_target_counts_as_it_is_kept(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="the file is written with it")
    from support.formats import gguf_file

    kinds = {"_exps": "q4_k", "": "q8_0"}
    file = gguf_file.write_gguf(tmp_path / "moe.gguf", "qwen3moe", kinds, experts=4, tied=False)
    target = load_model(file, device="cpu")
    spec = described(Subject(target, None, None), monkeypatch)["target_spec"]
    assert spec["expert_bytes"] == WEIGHT_BYTES["q4_k"]
    assert spec["dense_bytes"] == pytest.approx(WEIGHT_BYTES["q8_0"])
    assert weight_format(target) == "q4_k"


def test_integers_of_experts_count_with_their_scales(monkeypatch):
    target = tiny_model("qwen3_moe", torch.bfloat16, hidden_size=64, moe_intermediate_size=64)
    assert (weight_format(target), weight_format(quantize(target, "int4"))) == ("plain", "int4")
    spec = described(Subject(target, None, None), monkeypatch)["target_spec"]
    assert spec["expert_bytes"] == WEIGHT_BYTES["int4"]


@pytest.mark.parametrize(("batch", "kept"), [(2, "q4_1"), (8, "int8")])
def test_a_draft_is_what_tiles_are_given_at_this_batch(packed, monkeypatch, batch, kept):
    """Its file has four bits; from eight rows on it is stored as rows of int8."""
    monkeypatch.setattr(kernels, "cpu_isa", lambda: "amx")
    target = tiny_llama().bfloat16()
    subject = Subject(target, packed, None)
    setup = described(subject, monkeypatch)
    (pair,) = measure_batch(subject, batch, [2], prompt_tokens=4, new_tokens=8, repetitions=1)
    line = cell_fields("tiny", subject, pair, setup)
    assert line["draft_format"] == kept
    rows = LAYERS * (2 * I + H) + len(vocabulary()[0])  # each with a scale of two bytes
    size = {"q4_1": WEIGHT_BYTES["q4_1"] * (MLPS + HEAD), "int8": MLPS + HEAD + 2 * rows}[kept]
    counted = ModelSpec.from_json(line["draft_spec"]).dense_weight_bytes
    assert counted == pytest.approx(2 * ATTENTION + size)
    assert len(group_cells([line, line | {"draft_format": "other"}])) == 2
    assert weight_format(packed) == "q4_1", "the next batch starts from the file's"


def test_automatic_lines_say_what_the_draft_was(packed, monkeypatch):
    monkeypatch.setattr(kernels, "cpu_isa", lambda: "amx")
    monkeypatch.setattr(automatic, "profile_rounds", lambda decoder: 0)
    subject = Subject(tiny_llama().bfloat16(), packed, None, prompts=[[5, 6, 7]] * 8)
    settings = automatic.Settings([2], new_tokens=4, rounds=1, budget_s=1, cold=True)
    assert measure_automatic(subject, 8, settings)["draft_format"] == "int8"
    assert measure_automatic(subject, 2, settings)["draft_format"] == "q4_1"


@pytest.mark.parametrize("prompts", [[], [[5, 6, 7]] * 3])
def test_no_line_is_of_a_larger_batch_than_its_prompts(prompts):
    subject = Subject(tiny_llama(), None, None, prompts=prompts)
    settings = automatic.Settings([2], new_tokens=4, rounds=1, budget_s=1, cold=True)
    with pytest.raises(ValueError, match=f"{len(prompts)} prompts, expected 4"):
        measure_automatic(subject, 4, settings)

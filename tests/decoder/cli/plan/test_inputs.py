"""What a plan counts of a model in a GGUF file, and which draft of the real model it counts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from decoder import smol
from decoder.__main__ import build_parser, main
from decoder.cli.plan.inputs import build_model
from decoder.perf_model.hardware import measure_machine
from decoder.perf_model.hardware.machine import named_machine
from decoder.perf_model.model_spec import WEIGHT_BYTES
from decoder.perf_model.presets import preset_config
from decoder.perf_model.profile import Profile

pytest.importorskip("gguf", reason="the files are written with it")

from support.formats.gguf_file import write_gguf
from support.tiny_smol import LAYERS, H, I, ship_tiny, vocabulary


def model_of(*flags: str) -> Any:
    model, _ = build_model(build_parser().parse_args(["plan", *flags]))
    return model


def test_the_real_models_draft_is_what_this_machine_would_run(tmp_path, monkeypatch):
    monkeypatch.setattr(smol, "default_device", lambda: "cpu")
    monkeypatch.setattr(measure_machine, "measure_machine", lambda *_: named_machine("h200"))
    ship_tiny(tmp_path, monkeypatch, "Q4_1")
    here = model_of("--target", "smol").draft
    assert here.name == "tiny"
    # Attention is in fp32, which is loaded in bf16; the head is the embedding's blocks.
    attention = LAYERS * 3 * H * H
    packed = LAYERS * 3 * H * I + len(vocabulary()[0]) * H
    expected = 2 * attention + WEIGHT_BYTES["q4_1"] * packed
    assert here.dense_weight_bytes == pytest.approx(expected)
    for other in (["--machine", "h200"], ["--dtype", "bf16"]):
        draft = model_of("--target", "smol", *other).draft
        assert draft.name == smol.draft_path().name
        assert draft.dense_weight_bytes == 2 * (attention + packed)
    assert model_of("--target", "smol", "--dtype", "int4").draft.dense_bytes == WEIGHT_BYTES["int4"]


def test_a_model_of_fp32_multiplies_and_caches_in_it(tmp_path, monkeypatch):
    measured = []

    def measure(_, dtype):
        measured.append(dtype)
        return named_machine("h200")

    monkeypatch.setattr(measure_machine, "measure_machine", measure)
    config = preset_config("olmoe").to_dict() | {"dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--target", str(tmp_path), "--draft", "none"]
    for more, products, size in (
        ([], "fp32", 4),
        (["--dtype", "fp32"], "fp32", 4),
        (["--dtype", "fp16"], "fp16", 2),
        (["--dtype", "int4"], "bf16", 2),
    ):
        model = model_of(*flags, "--machine", "h200", *more)
        assert (model.dtype, model.target.kv_bytes) == (products, size), more
        assert model_of(*flags, *more).dtype == products
    assert measured == [torch.float32, torch.float32, torch.float16, torch.bfloat16]


def test_a_profile_takes_another_draft_and_no_dtype(tmp_path, capsys):
    fitted = model_of("--target", "olmoe", "--machine", "h200")
    file = tmp_path / "profile.json"
    Profile(fitted, points=10, context=512).save(file)
    for target in ([], ["--target", "olmoe"]):
        flags = ["--machine", str(file), *target]
        assert model_of(*flags).draft == fitted.draft
        assert model_of(*flags, "--draft", "none").draft is None
        assert model_of(*flags, "--draft", "opt-350m").draft.name == "opt-350m"
        for more, named in (
            (["--draft", "/none.json"], "none.json"),
            (["--dtype", "int4"], "int4"),
        ):
            assert main(["plan", *flags, *more]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert named in line


def test_experts_and_the_rest_count_as_they_are_stored(tmp_path):
    kinds = {"_exps": "q4_k", "": "q8_0"}
    file = str(write_gguf(tmp_path / "moe.gguf", "qwen3moe", kinds, experts=4, tied=False))
    spec = model_of("--target", file, "--draft", file, "--machine", "h200").draft
    assert (spec.name, spec.moe.num_experts, spec.expert_bytes) == ("moe", 4, WEIGHT_BYTES["q4_k"])
    assert WEIGHT_BYTES["q8_0"] < spec.dense_bytes < 1.1, "routers are in fp32, loaded in bf16"
    spec = model_of("--target", file, "--machine", "h200", "--dtype", "fp8").target
    assert spec.dense_bytes == spec.expert_bytes == WEIGHT_BYTES["fp8"], "as it is asked for"


def test_a_damaged_file_is_one_line(tmp_path, capsys):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUFgguf")
    assert main(["plan", "--target", str(file), "--machine", "h200"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.gguf cannot be read as GGUF" in line


def test_json_names_the_file(tmp_path, capsys):
    file = str(write_gguf(tmp_path / "small.gguf", "llama", {"": "q4_0"}))
    assert main(["plan", "--target", "olmoe", "--draft", file, "--machine", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["draft"] == "small"

"""What a plan counts of a model in a GGUF file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from decoder.__main__ import build_parser, main
from decoder.cli.plan.inputs import build_model
from decoder.perf_model.model_spec import WEIGHT_BYTES

pytest.importorskip("gguf", reason="the files are written with it")

from support.formats.gguf_file import write_gguf


def model_of(*flags: str) -> Any:
    model, _ = build_model(build_parser().parse_args(["plan", *flags]))
    return model


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

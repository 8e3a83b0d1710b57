"""What a line says of the draft's weights: the bytes that they are kept in."""

from __future__ import annotations

import pytest
from support.tiny_smol import LAYERS, H, I, tiny_llama, vocabulary, write_gguf

from bench.runs.decode_lines import draft_spec
from decoder.model.loading import load_model
from decoder.perf_model.config_spec import spec_from_config
from decoder.perf_model.model_spec import WEIGHT_BYTES
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

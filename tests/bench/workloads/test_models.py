"""Targets and drafts from disk: whole, and stored as a line can say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.hostile.folders import edited
from support.tiny import tiny_model

from bench.workloads.models import load_model, load_subject
from bench.workloads.trained import TrainedPair
from moesd_kernels import quantize


def test_integers_are_read_as_such_in_a_draft_and_refused_in_a_target(tmp_path: Path) -> None:
    """A line would call them plain; as plain numbers they are another model."""
    own = tmp_path / "own"
    model = quantize(tiny_model("qwen3_moe", moe_intermediate_size=32), "int8")
    model.save_pretrained(own)
    for options in ({}, {"num_experts_per_tok": model.config.num_experts_per_tok}):
        loaded = load_model(str(own), torch.float32, "cpu", **options).state_dict()
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(loaded[name], kept) for name, kept in model.state_dict().items())
    for top_k in (None, 1):
        with pytest.raises(ValueError, match="own holds quantised weights, expected plain ones"):
            load_subject(str(own), None, torch.float32, "cpu", top_k)
    with pytest.raises(ValueError, match="own holds quantised weights, expected plain ones"):
        TrainedPair("own", "ngram", own, None).load_target(torch.float32, "cpu")


@pytest.mark.parametrize("top_k", [None, 1])
def test_a_way_to_quantise_that_nobody_knows_is_refused(top_k: int | None, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "a")
    edited("config.json", quantization_config={"quant_method": "modelopt"})(tmp_path / "a")
    with pytest.raises(ValueError, match="knows no quant_method 'modelopt'"):
        load_subject(str(tmp_path / "a"), None, torch.float32, "cpu", top_k)

"""What ``quantize`` made is saved and loaded by transformers' own calls, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families.building import build
from support.tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import build_drafter
from decoder.model.loading import load_model
from moesd_kernels import keep_quantized, quantize, quantize_experts

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 32,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES = ["llama", "mixtral", "qwen2_moe", "gpt_oss"]


def made(family: str, **changes: Any) -> Any:
    sizes = SIZES | ({"shared_expert_intermediate_size": 64} if family == "qwen2_moe" else {})
    return tiny_model(family, **sizes | changes)


def load(folder: Path) -> Any:
    with keep_quantized():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def assert_same(model: Any, other: Any) -> None:
    state, loaded = model.state_dict(), other.state_dict()
    assert state.keys() == loaded.keys()
    for name, tensor in state.items():
        assert tensor.dtype == loaded[name].dtype and torch.equal(tensor, loaded[name]), name


@pytest.mark.parametrize("group", [64, 128, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, group: int | None, tmp_path: Path) -> None:
    tables = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    model = quantize(made(family, tie_word_embeddings=family == "llama"), "int8", group=group)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert tables == (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert_same(model, loaded)
    ids = torch.arange(6).view(1, 6)
    loaded.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["BertLMHeadModel", "ProphetNetForCausalLM", "ZambaForCausalLM"])
def test_what_else_a_model_ties_is_saved_too(family: str, tmp_path: Path) -> None:
    """A bias, an embedding, norms: their ties hang on the flag of the head's."""
    model = build(family)
    assert len(model.all_tied_weights_keys) > 1
    quantize(model, "int8").save_pretrained(tmp_path)
    with keep_quantized():
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert_same(model, loaded)


def test_every_step_is_recorded(tmp_path: Path) -> None:
    """Experts in four bits, saved, loaded, the rest in eight."""
    model = quantize_experts(made("mixtral"), "int4")
    model.save_pretrained(tmp_path / "experts")
    model, loaded = quantize(model, "int8"), quantize(load(tmp_path / "experts"), "int8")
    assert_same(model, loaded)
    loaded.save_pretrained(tmp_path / "all")
    assert_same(model, load(tmp_path / "all"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_that_was_quantised_alone(family: str, tmp_path: Path) -> None:
    """It shares its config with the whole, whose head keeps its numbers."""
    model = made(family)
    quantize(model.model, "int8")
    model.save_pretrained(tmp_path / "part")
    loaded = load(tmp_path / "part")
    assert type(loaded.lm_head) is type(model.lm_head) is nn.Linear
    assert_same(model, loaded)
    for whole in (model, loaded):
        quantize(whole, "int4")
    assert_same(model, loaded)
    loaded.save_pretrained(tmp_path / "all")
    assert_same(model, load(tmp_path / "all"))


def test_a_scale_that_is_in_no_file_is_named(tmp_path: Path) -> None:
    """A layer's attention shares the config too, and there are many of its class."""
    model = made("llama")
    quantize(model.model.layers[0].self_attn, "int8")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no model\.layers\.1\.self_attn\.q_proj\.weight_scale: "):
        load(tmp_path)


def test_files_of_before_a_step_named_its_model(tmp_path: Path) -> None:
    model = quantize(made("llama"), "int8")
    model.save_pretrained(tmp_path)
    change_steps(tmp_path, lambda steps: [{**steps[0], "of": "Other"}])
    assert_same(model, load(tmp_path))
    change_steps(tmp_path, lambda steps: [{n: v for n, v in steps[0].items() if n != "of"}])
    assert_same(model, load(tmp_path))


def test_the_decoder_takes_the_folder(tmp_path: Path) -> None:
    model = quantize(made("mixtral"), "int8")
    model.save_pretrained(tmp_path)
    greedy = SamplingParams(max_new_tokens=9, ignore_eos=True)

    def outputs(model: Any) -> list[list[int]]:
        drafter = build_drafter("ngram", model)
        decoder = SpeculativeDecoder(model, drafter, 2, max_batch_size=2, max_length=64)
        return [output.token_ids for output in decoder.generate([[1, 2, 3], [9, 8]], greedy)]

    for packed in (True, False):  # nobody can unpack them: so an audit's reference has them, too
        assert outputs(load_model(tmp_path, packed=packed)) == outputs(model)


def change_steps(folder: Path, change: Callable[[Any], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    stored = config["quantization_config"]
    stored["steps"] = change(stored["steps"])
    (folder / "config.json").write_text(json.dumps(config))


STEPS: list[Any] = [
    None,
    [{"weight_format": "int8"}],
    [{"weight_format": "int8", "group": True, "linears": True}],
    [{"weight_format": "int8", "group": 32, "linears": True, "model": 1}],
    [{"weight_format": "int8", "group": 32, "linears": True, "of": 1}],
]


@pytest.mark.parametrize("steps", STEPS, ids=repr)
def test_a_config_may_say_anything(tmp_path: Path, steps: Any) -> None:
    quantize(made("llama"), "int8").save_pretrained(tmp_path)
    change_steps(tmp_path, lambda _: steps)
    with pytest.raises(ValueError, match="steps of moesd must each have weight_format, group, lin"):
        load(tmp_path)

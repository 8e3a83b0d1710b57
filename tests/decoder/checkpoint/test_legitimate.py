"""What looks odd in real checkpoints and is as it should be."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hostile.folders import edited, tensors, together, whole
from support.tiny import tiny_model
from torch import nn
from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

from decoder.checkpoint.config import read_config
from decoder.checkpoint.folder import inside
from decoder.checkpoint.report import without_other_parts
from decoder.checkpoint.weights import TensorHeader, few, require_whole_experts
from decoder.errors import UserError
from decoder.model.loading import context_length, load_model

HEADER = TensorHeader((4, 8), "BF16", 32)


def experts(part, count):
    return {f"layers.0.mlp.experts.{index}.{part}": HEADER for index in range(count)}


def test_experts_that_only_have_an_input_are_whole():
    """LongCat's: identity experts have rows of the joined input, and none of the output."""
    counts = {"gate_proj.weight": 12, "up_proj.weight": 12, "down_proj.weight": 8}
    held = {name: h for part, count in counts.items() for name, h in experts(part, count).items()}
    require_whole_experts(held)
    del held["layers.0.mlp.experts.11.up_proj.weight"]
    with pytest.raises(UserError, match=r"missing: layers\.0\.mlp\.experts\.11\.up_proj\.weight"):
        require_whole_experts(held)


def test_a_model_that_also_sees_is_loaded_without_its_eyes():
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList()
    eyes = {"vision_tower.layers.0.w", "vision.proj", "model.vision.layers.0.w"}
    found = {"unexpected_keys": eyes | {"model.layers.7.w"}}
    assert without_other_parts(found, model) == {"unexpected_keys": {"model.layers.7.w"}}


def test_a_context_without_limit(tmp_path):
    folder = whole(tmp_path / "model", "llama")
    edited("config.json", max_position_embeddings=-1)(folder)
    assert read_config(folder, 99).max_position_embeddings == -1
    model = tiny_model("llama")
    model.config.max_position_embeddings = -1
    assert context_length(model) == 2**15


def test_experts_per_token_of_each_layer(tmp_path):
    """As HunYuan-A13B's configuration has them."""
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "head_dim": 8, "num_experts": 8, "moe_topk": [4, 2],
    }  # fmt: skip
    model = HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").config.moe_topk == [4, 2]
    edited("config.json", moe_topk=[4, 9])(tmp_path)
    with pytest.raises(UserError, match=r"must be in \[1, 8\], got 9"):
        load_model(tmp_path, device="cpu")


def test_what_older_checkpoints_and_tied_heads_have_or_lack(tmp_path):
    """Rotary buffers of old files, a head that is the embedding, ends beyond the vocabulary."""
    folder = whole(tmp_path / "model", "llama", tie_word_embeddings=True)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    together(
        tensors(lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
        tensors(lambda t: t | {old: t["model.norm.weight"][:4].clone()}),
        edited("generation_config.json", eos_token_id=[2, 10**6]),
    )(folder)
    assert load_model(folder, device="cpu").generation_config.eos_token_id == [2, 10**6]


def test_a_folder_reached_by_a_link_is_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert inside(tmp_path / "link", tmp_path / "link" / "a")
    assert not inside(tmp_path / "link", Path("/etc/hostname"))


def test_few_names_are_listed_and_many_counted():
    assert few(["b", "a"]) == "a, b"
    assert few([str(i) for i in range(5)]) == "0, 1, 2, ... 5 in all"

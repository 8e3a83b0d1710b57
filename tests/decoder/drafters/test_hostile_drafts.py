"""Drafts and EAGLE heads that are none, do not fit or are broken: one line each."""

from __future__ import annotations

import json

import pytest
import torch
from support.eagle_reference import LAYER, H, norm, random_layer, save
from support.hostile.folders import (
    WEIGHTS,
    copied,
    edited,
    header,
    planted,
    refused,
    removed,
    tensors,
    together,
    whole,
    without,
    written,
)

from decoder.drafters import build_drafter
from decoder.drafters.heads.eagle_loader import load_eagle
from decoder.engine.loop import SpeculativeDecoder
from decoder.round import Draft

KEY = "eagle_aux_hidden_state_layer_ids"


def config(said="EAGLE config", **changes):
    return edited("config.json", **changes), said


def put(**more):
    return tensors(lambda held: held | {name.replace("__", "."): t for name, t in more.items()})


def pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"fc.weight": torch.ones(1)}, folder / "pytorch_model.bin")


HEADS = {
    "no configuration": (removed("config.json"), "has no config.json"),
    "a configuration that is a list": (written("config.json", "[]"), "JSON object, got list"),
    "a configuration that is no JSON": (written("config.json", "{"), "config.json"),
    "a layer that is text": config("must be an object", transformer_layer_config="x"),
    "no sizes": (written("config.json", "{}"), "lacks hidden_size, num_attention_heads"),
    "text for a size": config("cannot load", hidden_size="32"),
    "a negative size": config(hidden_size=-32),
    "no heads": config("cannot load", num_attention_heads=0),
    "no key-value heads": config(num_key_value_heads=0),
    "a head of no size": config(head_dim=0),
    "an epsilon that is text": config(rms_norm_eps="tiny"),
    "a negative epsilon": config(rms_norm_eps=-1.0),
    "an unknown activation": config("hidden_act is unknown", hidden_act="nope"),
    "feature layers that are text": config(**{KEY: "abc"}),
    "feature layers that are a number": config("cannot load", **{KEY: 7}),
    "nested feature layers as text": config("cannot load", eagle_config={KEY: "abc"}),
    "a negative window": config("sliding_window", sliding_window=-1),
    "architectures that are a number": config("EAGLE", architectures=7, head_dim=0),
    "no MLP": (without("mlp"), "lacks tensor layers.0.mlp.gate_proj.weight"),
    "no last part of the MLP": (without("down_proj"), "lacks tensor layers.0.mlp.down_proj"),
    "no norm": (without("post_attention"), "lacks tensor layers.0.post_attention_layernorm"),
    "no fc": (without("fc."), "no tensor named fc.weight"),
    "a tensor too many": (put(other=torch.ones(2)), "tensors of no known head: other"),
    "a layer that is left out": (put(layers__7__x=torch.ones(2)), "lacks tensor layers.1."),
    "a layer without number": (put(layers__x__y=torch.ones(2)), "lacks tensor layers.1."),
    "an MLP of another width": (
        put(midlayer__mlp__up_proj__weight=torch.ones(7, H)),
        "layers.0.mlp.up_proj.weight must be (48, 32) by its config, got (7, 32)",
    ),
    "a norm of another width": (put(norm__weight=torch.ones(7)), "norm.weight must be (32)"),
    "a matrix for a norm": (put(norm__weight=torch.ones(7, 7)), "norm.weight must be (32)"),
    "fc of another width": (put(fc__weight=torch.ones(7, 96)), "fc.weight must be (32, any)"),
    "a list for fc": (put(fc__weight=torch.ones(7)), "fc.weight must be (32, any)"),
    "a head of another width": (put(lm_head__weight=torch.ones(8, 7)), "lm_head.weight must be"),
    "integers for weights": (put(norm__weight=torch.ones(H).int()), "must be fp64, fp32"),
    "eight bits for weights": (
        put(norm__weight=torch.ones(H).to(torch.float8_e4m3fn)),
        "must be fp64, fp32",
    ),
    "a map that leads below zero": (put(d2t=torch.full((8,), -9)), "d2t leads to token -9"),
    "a map to one token twice": (put(d2t=-torch.arange(8)), "gives two draft tokens one"),
    "a map of numbers with a point": (put(d2t=torch.ones(8)), "must be a list of integers"),
    "a map of no shape": (put(d2t=torch.tensor(3)), "must be a list of integers"),
    "a map of another length": (put(d2t=torch.arange(5)), "got 8 and 5"),
    "ids that t2d does not mark": (put(t2d=torch.ones(64)), "d2t must lead to the 64 tokens"),
    "a mask without its token": (put(mask_hidden=torch.ones(1, 1, 3 * H)), "needs mask_token_id"),
    "a mask of another shape": (
        together(edited("config.json", pard_token=3), put(mask_hidden=torch.ones(1, 1, 7))),
        "mask_hidden must be (1, 1, 96) by its config, got (1, 1, 7)",
    ),
    "a mask token that is text": (
        edited("config.json", parallel_drafting=True, pard_token="x"),
        "needs mask_token_id",
    ),
    "one pass without a mask": (
        edited("config.json", parallel_drafting=True, ptd_token_id=3),
        "lacks tensor mask_hidden",
    ),
    "an empty file": (written(WEIGHTS, b""), "is empty"),
    "a cut file": (lambda f: written(WEIGHTS, (f / WEIGHTS).read_bytes()[:-9])(f), "cannot read"),
    "a garbled file": (written(WEIGHTS, header(b"nope")), "cannot read"),
    "a pickle": (pickled, "can run code and are not read"),
    "no weights": (removed(WEIGHTS), "has neither"),
    "an adapter": (written("adapter_config.json", "{}"), "adapter"),
}
UNFIT = {  # only the target shows it
    "a map beyond the target": (put(d2t=torch.full((8,), 99)), "d2t reaches token 106"),
    "layers that the target lacks": (edited("config.json", **{KEY: [1, 2, 9]}), "hidden states"),
    "a mask token beyond the target": (
        together(edited("config.json", pard_token=99), put(mask_hidden=torch.ones(1, 1, 3 * H))),
        "mask token is 99, its embedding has 64 tokens",
    ),
    "features of another width": (put(fc__weight=torch.ones(H, 7)), "features of width 7"),
    "an embedding of fewer tokens": (put(embed_tokens__weight=torch.ones(9, H)), "embeds 9 tokens"),
    "a rope that is none": (edited("config.json", rope_scaling={"rope_type": "x"}), "rotary"),
    "a rope that is text": (edited("config.json", rope_theta="x"), "rotary"),
}
DRAFTS = {
    "missing weights": (removed(WEIGHTS), "has neither"),
    "a missing layer": (without("layers.1."), "missing: model.layers.1"),
    "a broken tokenizer": (written("tokenizer.json", "{"), "cannot load tokenizer"),
    "a tokenizer of another": (
        lambda f: whole(f, vocab_size=65) and edited("config.json", vocab_size=64)(f),
        "(65, 32) for (64, 32)",
    ),
    "code": (
        together(
            edited("config.json", model_type="own", auto_map={"AutoModelForCausalLM": "m.Any"}),
            lambda folder: planted(folder, "m.py"),
        ),
        "needs Python code of its own, which is never run",
    ),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("whole") / "target", num_hidden_layers=6)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    weights = random_layer("midlayer", 2 * H, 0) | {
        "midlayer.hidden_norm.weight": norm(H, 1),
        "midlayer.input_layernorm.weight": norm(H, 2),
        "norm.weight": norm(H, 3),
        "fc.weight": torch.ones(H, 3 * H),
        "lm_head.weight": torch.ones(8, H),
        "d2t": torch.arange(8),
    }
    return save(tmp_path_factory.mktemp("head") / "draft", LAYER, weights)


@pytest.mark.parametrize(("change", "said"), HEADS.values(), ids=HEADS)
def test_a_head_is_one_or_refused(change, said, head, tmp_path, monkeypatch):
    folder = copied(head, tmp_path / "draft")
    change(folder)
    with refused(folder, said, monkeypatch):
        load_eagle(folder)


@pytest.mark.parametrize(("change", "said"), UNFIT.values(), ids=UNFIT)
def test_a_head_is_the_targets_or_refused(change, said, head, target, tmp_path, monkeypatch):
    folder = copied(head, tmp_path / "draft")
    change(folder)
    with refused(folder, said, monkeypatch):
        SpeculativeDecoder.from_paths(target, folder, device="cpu")


@pytest.mark.parametrize(("change", "said"), DRAFTS.values(), ids=DRAFTS)
def test_a_draft_is_one_or_refused(change, said, target, tmp_path, monkeypatch):
    folder = copied(target, tmp_path / "draft")
    change(folder)
    with refused(folder, said, monkeypatch):
        SpeculativeDecoder.from_paths(target, folder, device="cpu")


def test_a_draft_of_another_vocabulary(target, tmp_path, monkeypatch):
    folder = whole(tmp_path / "draft")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"]
    tokens["w7"], tokens["w8"] = tokens["w8"], tokens["w7"]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    with refused(folder, "token 7 is 'w7' for the target and 'w8' for the draft", monkeypatch):
        SpeculativeDecoder.from_paths(target, folder, device="cpu")


@pytest.mark.parametrize(
    "drafter", ["auto", "ngram", "self", "eagle", "mtp", "independent", "replay"]
)
def test_a_draft_that_is_not_there_is_never_passed_over(drafter, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, said in (
        ("nowhere", "does not exist"),
        ("file", "must be a directory"),
        ("empty", "is an empty folder"),
    ):
        with refused(tmp_path, said, monkeypatch):
            build_drafter(drafter, None, tmp_path / name)


def test_a_drafter_that_takes_no_draft_is_given_none(target, monkeypatch):
    for drafter in ("ngram", "self", "none"):
        with refused(target, f"drafter '{drafter}' takes no draft", monkeypatch):
            build_drafter(drafter, None, target)


def test_lengths_are_at_most_the_columns() -> None:
    """A drafter may have cut its tokens and not said so: nothing would follow a last draft."""
    draft = Draft(torch.tensor([[9], [9], [9]]), None, torch.tensor([4, 1, -2]))
    limited = draft.limited([3, 3, 3])
    assert limited is not None and limited.lengths.tolist() == [1, 1, 0]
    limited = draft.limited([0, 3, 3])
    assert limited is not None and limited.lengths.tolist() == [0, 1, 0]

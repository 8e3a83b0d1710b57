"""Configurations and tokenizers that are no such thing, lie, or bring code: one line each."""

from __future__ import annotations

import pytest
import torch
from support.hostile.folders import (
    copied,
    edited,
    planted,
    refused,
    removed,
    together,
    whole,
    written,
)

from decoder import errors
from decoder.__main__ import main
from decoder.engine.loop import SpeculativeDecoder
from decoder.model.loading import load_model, load_tokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
AUTO = {"AutoConfig": "code.Any", "AutoModelForCausalLM": "code.Any"}
DEEP = "[" * 10**5


def code(*names):
    return lambda folder: planted(folder, *names)


def config(said="config.json", **changes):
    return edited(CONFIG, **changes), said


CONFIGS = {
    "missing": (removed(CONFIG), "has no config.json"),
    "empty": (written(CONFIG, ""), "config.json is empty"),
    "no JSON": (written(CONFIG, "{'a': 1}"), "cannot read"),
    "a list": (written(CONFIG, "[1]"), "must hold a JSON object, got list"),
    "null": (written(CONFIG, "null"), "must hold a JSON object, got NoneType"),
    "nested": (written(CONFIG, '{"a":' * 10**5 + "1" + "}" * 10**5), "config.json"),
    "deep": (written(CONFIG, DEEP), "config.json"),
    "not UTF-8": (written(CONFIG, b"\xff\xfe{}"), "config.json"),
    "a byte order mark": (written(CONFIG, b"\xef\xbb\xbf{}"), "config.json"),
    "a pointer of git-lfs": (written(CONFIG, "version https://git-lfs.github.com/\n"), "lfs pull"),
    "no model_type": (written(CONFIG, "{}"), "knows no model_type None"),
    "an unknown model_type": config("knows no model_type 'nope'", model_type="nope"),
    "a model_type that is a list": config("knows no model_type ['a']", model_type=["a"]),
    "a model that is no causal one": config(model_type="clip"),
    "text for a size": config(hidden_size="32"),
    "a negative size": config(hidden_size=-32),
    "a size of zero": config(hidden_size=0),
    "half a size": config(hidden_size=32.5),
    "a size of true": config(num_hidden_layers=True),
    "a list for a size": config(hidden_size=[32]),
    "a huge size": config("describes", hidden_size=10**9, head_dim=8),
    "a huge vocabulary": config("describes", vocab_size=10**12),
    "a size beyond any": config("below 2**53", vocab_size=10**30),
    "no layers": config("num_hidden_layers must be a positive", num_hidden_layers=0),
    "a billion layers": config("num_hidden_layers must be at most", num_hidden_layers=10**9),
    "a billion experts": config(num_experts=10**9),
    "a billion labels": config("num_labels must be at most", num_labels=10**9),
    "no heads": config(num_attention_heads=0),
    "no key-value heads": config("num_key_value_heads must be", num_key_value_heads=0),
    "heads that do not divide": config("must be a multiple", num_key_value_heads=3),
    "a head of no size": config(head_dim=0),
    "no experts a token": config("must be in [1, 8], got 0", num_experts_per_tok=0),
    "more experts a token than there are": config("[1, 8], got 9", num_experts_per_tok=9),
    "no context": config("max_position_embeddings must be", max_position_embeddings=0),
    "context as text": config(max_position_embeddings="all"),
    "an unknown activation": config(hidden_act="nope"),
    "rope as text": config(rope_parameters="fast"),
    "an unknown rope": config(rope_parameters={"rope_type": "nope", "rope_theta": 1e4}),
    "layer types of another number": config(layer_types=["full_attention"]),
    "an unknown type of numbers": config(dtype="float33"),
    "a function for a type": config(dtype="load"),
    "an end that is text": config("", eos_token_id="</s>"),
    "a method overwritten": config(get_text_config="x"),
    "another configuration": config("configuration_files", configuration_files=["config.1.json"]),
    "code of its own": (
        together(edited(CONFIG, model_type="own", auto_map=AUTO), code("code.py")),
        "needs Python code of its own, which is never run",
    ),
    "code for a known model": (
        together(edited(CONFIG, model_type="clip", auto_map=AUTO), code("code.py")),
        "Python code of its own, which is never run",
    ),
    "an unknown quantization": config(quantization_config={"quant_method": "nope"}),
    "quantization as text": config(quantization_config="int4"),
    "generation: a list": (written(GENERATION, "[]"), GENERATION),
    "generation: no JSON": (written(GENERATION, "{"), GENERATION),
    "generation: deep": (written(GENERATION, DEEP), GENERATION),
    "generation: ends that are text": (edited(GENERATION, eos_token_id=["a"]), "eos_token_id"),
    "generation: a nested end": (edited(GENERATION, eos_token_id=[[2]]), "eos_token_id"),
    "generation: an end of true": (edited(GENERATION, eos_token_id=True), "eos_token_id"),
}
TOKENIZERS = {
    "missing": (removed(TOKENIZER), "has no tokenizer"),
    "empty": (written(TOKENIZER, ""), "tokenizer.json is empty"),
    "no JSON": (written(TOKENIZER, "{"), "cannot load tokenizer"),
    "a list": (written(TOKENIZER, "[]"), "cannot load tokenizer"),
    "an object": (written(TOKENIZER, "{}"), "cannot load tokenizer"),
    "deep": (written(TOKENIZER, DEEP), "cannot load tokenizer"),
    "not UTF-8": (written(TOKENIZER, b"\xff\xfe"), "cannot load tokenizer"),
    "a pointer of git-lfs": (written(TOKENIZER, "version https://git-lfs.g\n"), "git lfs pull"),
    "a model of no kind": (edited(TOKENIZER, model={"type": "nope"}), "cannot load tokenizer"),
    "a vocabulary of text": (
        edited(TOKENIZER, model={"type": "WordLevel", "vocab": "abc", "unk_token": "a"}),
        "cannot load tokenizer",
    ),
    "no tokens": (
        edited(TOKENIZER, model={"type": "WordLevel", "vocab": {}, "unk_token": "a"}),
        "tokenizer",
    ),
    "a configuration that is a list": (written(TOKENIZER_CONFIG, "[]"), "JSON object"),
    "a configuration that is no JSON": (written(TOKENIZER_CONFIG, "{"), TOKENIZER_CONFIG),
    "files elsewhere": (edited(TOKENIZER_CONFIG, vocab_file="/etc/hostname"), "leads out"),
    "files above": (edited(TOKENIZER_CONFIG, vocab_file="../model/../.."), "leads out"),
    "other files": (edited(TOKENIZER_CONFIG, fast_tokenizer_files=["a"]), "fast_tokenizer_files"),
    "code of its own": (
        together(
            edited(CONFIG, model_type="own"),
            edited(
                TOKENIZER_CONFIG,
                tokenizer_class="Own",
                auto_map={"AutoTokenizer": ["code.Any", "code.Any"]},
            ),
            code("code.py"),
        ),
        "Python code of its own, which is never run",
    ),
}
# Code beside a model that needs none of it: it loads, and the code is not run.
UNUSED_CODE = {
    "in auto_map": together(
        edited(CONFIG, auto_map=AUTO),
        edited(TOKENIZER_CONFIG, auto_map={"AutoTokenizer": ["code.Any", "code.Any"]}),
        code("code.py"),
    ),
    "elsewhere in auto_map": edited(CONFIG, auto_map={"AutoModelForCausalLM": "a/b--code.Any"}),
    "custom generation": code("custom_generate/generate.py", "generate.py"),
    "a kernel of the hub for attention": edited(CONFIG, attn_implementation="a/b"),
    "for experts": edited(CONFIG, experts_implementation="a/b"),
    "in a private key": edited(CONFIG, _attn_implementation="a/b:c"),
    "an import": code("__init__.py", "torch.py", "conftest.py", "sitecustomize.py"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("whole") / "model")


@pytest.mark.parametrize(("change", "said"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_is_one_or_refused(change, said, model, tmp_path, monkeypatch):
    folder = copied(model, tmp_path / "model")
    change(folder)
    with refused(folder, said, monkeypatch):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(("change", "said"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_is_one_or_refused(change, said, model, tmp_path, monkeypatch):
    folder = copied(model, tmp_path / "model")
    change(folder)
    with refused(folder, said, monkeypatch):
        load_tokenizer(folder)


@pytest.mark.parametrize("change", UNUSED_CODE.values(), ids=UNUSED_CODE)
def test_code_beside_a_model_is_not_run(change, model, tmp_path, monkeypatch):
    folder = copied(model, tmp_path / "model")
    change(folder)
    with refused(folder, "as it is", monkeypatch):
        loaded = load_model(folder, device="cpu")
        assert loaded.config._attn_implementation in ("eager", "sdpa")
        assert load_tokenizer(folder).get_vocab()
        raise errors.UserError("as it is")


def test_a_tokenizer_is_the_models(model, tmp_path, monkeypatch):
    larger = whole(tmp_path / "larger", vocab_size=65)
    folder = copied(model, tmp_path / "model")
    (folder / TOKENIZER).write_bytes((larger / TOKENIZER).read_bytes())
    assert main(["generate", "--target", str(folder), "--prompt", "w1", "--device", "cpu"]) == 2
    with refused(folder, "it has 65 tokens, the model 64", monkeypatch):
        SpeculativeDecoder.from_paths(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/such", "'no/such' is no directory here"),
        ("/no/such", "'/no/such' does not exist"),
        ("nosuch", "'nosuch' does not exist"),
        ("a/b c", "'a/b c' is no directory here"),
        ("a\nb\x1b[2J", "does not exist"),
        ("a\0b", "does not exist"),
        ("x" * 300, "too long"),
        ("", "'' does not exist"),
    ],
)
def test_a_name_that_leads_nowhere(name, said, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused(tmp_path, said, monkeypatch):
        load_model(name, device="cpu")


def test_files_are_no_folders_and_empty_folders_no_models(model, tmp_path, monkeypatch):
    (tmp_path / "model").write_bytes(b"GGUF")
    with refused(tmp_path, "must be a directory", monkeypatch):
        load_model(tmp_path / "model", device="cpu")
    (tmp_path / "empty").mkdir()
    with refused(tmp_path, "is an empty folder", monkeypatch):
        load_model(tmp_path / "empty", device="cpu")


def test_a_device_that_is_not_there(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda:99", "nope", "meta", "cpu:x"):
        with refused(model, f"'{device}'", monkeypatch):
            load_model(model, device=device)


def test_a_snapshot_of_the_hubs_cache_is_read(model, tmp_path, monkeypatch):
    """Its files are links into the cache's blobs, and its name is enough without a network."""
    cache = tmp_path / "models--owner--name"
    snapshot, blobs = cache / "snapshots" / ("0" * 40), cache / "blobs"
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    blobs.mkdir()
    for file in sorted(model.iterdir()):
        (blobs / f"blob-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (snapshot, "owner/name"):
        assert load_tokenizer(name).get_vocab()
        assert load_model(name, device="cpu").config.vocab_size == 64


COMMANDS = {
    "weights missing": (
        removed("model.safetensors"),
        ["--target"],
        "has neither model.safetensors",
    ),
    "GGUF": (
        together(removed("model.safetensors"), written("m.gguf", "GGUF")),
        ["--target"],
        "a GGUF file is given by its own path",
    ),
    "code": (*CONFIGS["code of its own"][:1], ["--target"], "which is never run"),
    "a draft's code": (
        CONFIGS["code of its own"][0],
        ["--target", "embedded", "--draft"],  # loaded first: not the default, which is large
        "which is never run",
    ),
    "a draft nobody asks": (
        removed(CONFIG),
        ["--drafter", "ngram", "--draft"],
        "not read by ngram",
    ),
}


@pytest.mark.parametrize(("change", "flags", "said"), COMMANDS.values(), ids=COMMANDS)
def test_the_command_line_says_it_in_one_line(change, flags, said, model, tmp_path, capsys):
    folder = copied(model, tmp_path / "model")
    change(folder)
    assert main(["generate", "--prompt", "w1", "--device", "cpu", *flags, str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("moesd: error: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1

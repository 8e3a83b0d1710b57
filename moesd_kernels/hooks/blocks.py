"""The MoE blocks of a checkpoint's model, made without weights of its ``config.json``."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

# In a layer's name: which one, when what follows is a part of it.
_PART_OF_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.[^.]+$")
# What a block computes beside router, experts and shared expert cannot be seen from outside:
# families by transformers' ``model_type`` whose blocks tests hold ours against.
FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "glm4_moe",
    "gpt_oss",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)
_QUANTISED = ("fp8", "mxfp4")
_MOST_LAYERS, _MOST_ROUTED = 1024, 2**26


class Blocks(NamedTuple):
    """A model's blocks.

    Attributes:
        layers: how many layers it has.
        by_layer: the blocks with experts, on the "meta" device.
    """

    layers: int
    by_layer: dict[int, nn.Module]


def moe_blocks(folder: Path) -> Blocks:
    """transformers' blocks for a folder with a ``config.json``; nothing in it is run or fetched.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        ValueError: it cannot be read, transformers knows no such causal LM, or weights that are
            quantised in a way that is not read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no config.json in {folder}: give config=")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"expected an object, got {type(fields).__name__}")
        _require_readable(fields)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        layers = _layers(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_plain(config), trust_remote_code=False)
    except Exception as error:  # whatever a hostile or unknown configuration leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it names {reason}, which is not known"
        raise ValueError(f"{file} gives no block: {reason}") from error
    found = {}
    for name, module in model.named_modules():
        match = _PART_OF_LAYER.search(name)
        if match and isinstance(getattr(module, "experts", None), nn.Module):
            found[int(match[1])] = module
    for block in found.values():
        _require_probable(block, file)
    return Blocks(layers, found)


def _require_readable(fields: dict[str, Any]) -> None:
    if (kind := fields.get("model_type")) not in FAMILIES:
        raise ValueError(f"the families that are known are {', '.join(FAMILIES)}, got {kind!r}")
    stored = fields.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if method is not None and method not in _QUANTISED:
        raise ValueError(f"weights quantised as {' or '.join(_QUANTISED)} are read, got {method!r}")


def _layers(config: Any) -> int:
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers must be in [1, {_MOST_LAYERS}], got {layers!r}")
    return layers


def _require_probable(block: nn.Module, file: Path) -> None:
    """Refuse a router that is no model's: what it computes is found by trying it."""
    router = getattr(block, "gate", None) or getattr(block, "router", None)
    for weight in router.parameters() if isinstance(router, nn.Module) else ():
        if weight.numel() > _MOST_ROUTED:
            raise ValueError(f"{file} gives no block: it has a router of {tuple(weight.shape)}")


def _plain(config: Any) -> Any:
    """The configuration without implementations, which may name code on the model hub."""
    config = copy.deepcopy(config)
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in filter(None, parts):
        part._attn_implementation = part._experts_implementation = "eager"
    return config

"""What was trained becomes the package's assets: small files, from which the model is built."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from decoder.model.kernels import cache_folder
from decoder.smol.build import folder_of, record
from decoder.smol.difference import write_difference
from decoder.smol.head import write_head
from decoder.smol.recipe import ASSETS, Recipe, shipped
from decoder.smol.tuned import write_changes
from moesd_kernels.hooks.loading.gguf.families import LAYER, K, Q
from training.checkpoint import load_checkpoint
from training.upcycle.experts import MATRICES


def dense_path() -> Path:
    """Folder of the dense model: what the draft is without assets."""
    recipe = Recipe(shipped().file, assets=cache_folder("dense"))
    record(recipe)
    return folder_of(recipe, "draft")


def _asset(name: str) -> Path:
    """Where it is written; a training from nothing has no folder yet."""
    ASSETS.mkdir(exist_ok=True)
    return ASSETS / f"{name}.safetensors"


def install_target(checkpoint: Path) -> None:
    """Write the difference of a run's ``target.pt``, and record what the built model hashes to.

    Args:
        checkpoint: from ``training.upcycle.target``.
    """
    layers = load_checkpoint(checkpoint)["layers"]
    write_difference(_asset("difference"), factors(layers))
    record(shipped())


def factors(layers: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A checkpoint's layers under the names of the difference file."""
    named = {}
    for index, layer in enumerate(layers):
        named[f"layers.{index}.router"] = layer["router"]
        for matrix in MATRICES:
            for side in ("left", "right"):
                name = f"layers.{index}.{matrix}.{side}"
                named[name] = layer[f"differences.{matrix}.{side}"]
    return named


def install_draft(checkpoint: Path, config: Any) -> None:
    """Write the changes of a run's ``draft.pt``, and record what the built draft hashes to.

    Args:
        checkpoint: from ``training.upcycle.draft``.
        config: the dense Llama's.
    """
    state = load_checkpoint(checkpoint)
    write_changes(_asset("draft"), changes(state["layers"], state["units"], config))
    record(shipped())


def changes(
    layers: dict[str, dict[str, torch.Tensor]], units: dict[str, float], config: Any
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A checkpoint's layers under the GGUF file's names and in its order of rows.

    A file for llama.cpp has the two halves of a head's rotary dimensions side by side.
    """
    heads = {Q: config.num_attention_heads, K: config.num_key_value_heads}
    found = {}
    for name, layer in layers.items():
        _, _, index, module = name.split(".", 3)
        part = f"{module}.weight"
        pair = layer["scale"], layer["least"] * units[name]
        if part in heads:
            paired = [p.unflatten(0, (heads[part], 2, -1)).transpose(1, 2) for p in pair]
            pair = paired[0].flatten(0, 2), paired[1].flatten(0, 2)
        found[f"blk.{index}.{LAYER[part]}"] = pair
    return found


def install_eagle(head: Path) -> None:
    """Write the asset of an EAGLE-3 head in its published layout, and record its hash.

    Args:
        head: a folder of ``config.json`` and ``model.safetensors``.
    """
    config = json.loads((head / "config.json").read_text())
    write_head(_asset("eagle"), load_file(head / "model.safetensors"), config)
    record(shipped())

"""What was trained becomes the package's assets: small files, from which the model is built."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from decoder.smol import draft_path
from decoder.smol.build import record
from decoder.smol.difference import write_difference
from decoder.smol.head import write_head
from decoder.smol.recipe import ASSETS, shipped
from training.upcycle.experts import MATRICES


def dense_path() -> Path:
    """Folder of the dense model, built like the package's other parts; needs no assets yet."""
    ASSETS.mkdir(exist_ok=True)
    record(shipped())
    return draft_path()


def install_target(checkpoint: Path) -> None:
    """Write the difference of a run's ``target.pt``, and record what the built model hashes to.

    Args:
        checkpoint: from ``training.upcycle.target``.
    """
    layers = torch.load(checkpoint, weights_only=True)["layers"]
    write_difference(ASSETS / "difference.safetensors", factors(layers))
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


def install_eagle(head: Path) -> None:
    """Write the asset of an EAGLE-3 head in its published layout, and record its hash.

    Args:
        head: a folder of ``config.json`` and ``model.safetensors``.
    """
    config = json.loads((head / "config.json").read_text())
    write_head(ASSETS / "eagle.safetensors", load_file(head / "model.safetensors"), config)
    record(shipped())

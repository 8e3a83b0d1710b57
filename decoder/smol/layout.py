"""The model's folders as transformers reads them: Mixtral target, dense draft, EAGLE-3 head.

The target is in the layout that Mixtral was published in, one tensor per expert and matrix, in
several files, so that no more than a few layers are in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from decoder.checkpoint.folder import CONFIG
from decoder.checkpoint.weights import INDEX, WEIGHTS

from .difference import MATRICES, Difference
from .head import read_head

TOP_K = 2
CARD = Path(__file__).parent / "MODEL_CARD.md"
_LAYERS_A_FILE = 5
_PUBLISHED = {"gate": "w1", "up": "w3", "down": "w2"}  # Mixtral's names of the matrices
_FORMAT = {"format": "pt"}


def write_target(
    folder: Path,
    config: dict[str, Any],
    dense: Mapping[str, Tensor],
    difference: Difference,
    progress: Callable[[], Any],
) -> None:
    """Write Mixtral's configuration and weights; the card beside them is ``README.md``.

    Args:
        folder: exists.
        config: of the dense model, from ``DenseFile``.
        dense: its fp32 weights.
        difference: what makes its experts.
        progress: called after each layer.
    """
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    layers = config["num_hidden_layers"]
    own = {"num_local_experts": len(difference.router(0)), "num_experts_per_tok": TOP_K}
    _write_configs(folder, MixtralConfig, config | own)
    shutil.copyfile(CARD, folder / "README.md")
    files = -(-layers // _LAYERS_A_FILE)
    places: dict[str, str] = {}
    size = 0
    for index in range(files):
        tensors = {} if index else _outside_layers(dense)
        for layer in range(index * _LAYERS_A_FILE, min((index + 1) * _LAYERS_A_FILE, layers)):
            tensors |= _layer(dense, difference, layer)
            progress()
        name = f"model-{index + 1:05}-of-{files:05}.safetensors"
        save_file(tensors, folder / name, metadata=_FORMAT)
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})


def _outside_layers(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: weight.bfloat16() for n, weight in dense.items() if not n.startswith("model.layers")}


def _layer(dense: Mapping[str, Tensor], difference: Difference, layer: int) -> dict[str, Tensor]:
    """One layer's tensors under Mixtral's names."""
    prefix = f"model.layers.{layer}."
    moe = f"{prefix}block_sparse_moe."
    tensors = {f"{moe}gate.weight": difference.router(layer)}
    tensors |= {
        name: weight.bfloat16()
        for name, weight in dense.items()
        if name.startswith(prefix) and ".mlp." not in name
    }
    for matrix in MATRICES:
        experts = difference.experts(layer, matrix, dense[f"{prefix}mlp.{matrix}_proj.weight"])
        for e, weight in enumerate(experts):
            tensors[f"{moe}experts.{e}.{_PUBLISHED[matrix]}.weight"] = weight
    return tensors


def write_draft(folder: Path, config: dict[str, Any], dense: Mapping[str, Tensor]) -> None:
    """Write the dense Llama in bf16."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    _write_configs(folder, LlamaConfig, config)
    tensors = {name: weight.bfloat16() for name, weight in dense.items()}
    save_file(tensors, folder / WEIGHTS, metadata=_FORMAT)


def write_eagle(folder: Path, head: Path, output: Tensor) -> None:
    """Write the EAGLE-3 head in its published layout.

    Args:
        folder: exists.
        head: the repository's file of it.
        output: ``[V, H]``, the target's output projection.
    """
    from safetensors.torch import save_file

    state, config = read_head(head, output)
    _write_json(folder / CONFIG, config)
    save_file(state, folder / WEIGHTS, metadata=_FORMAT)


def _write_configs(folder: Path, kind: type[Any], config: dict[str, Any]) -> None:
    """The model's, and the published one's defaults of generation: where text begins and ends."""
    from transformers import GenerationConfig

    name = kind.__name__.replace("Config", "ForCausalLM")
    kind(**config, dtype="bfloat16", architectures=[name]).save_pretrained(folder)
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    GenerationConfig(**{key: config[key] for key in keys}).save_pretrained(folder)


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

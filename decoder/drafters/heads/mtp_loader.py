"""Read a checkpoint's multi-token-prediction heads: their tensors alone, by name.

The files are those of the target, or of a folder that holds nothing else. What a head's decoder
layer is made of, transformers knows of the target's family: it is a model of that family with one
layer, its tensors renamed. FP8 matrices are unpacked; other packed ones are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoder.checkpoint.counts import is_positive
from decoder.checkpoint.folder import CONFIG, model_folder, read_json
from decoder.checkpoint.mtp_layouts import MTP_LAYOUTS, MtpLayout, mtp_heads
from decoder.checkpoint.weights import (
    few,
    read_tensors,
    require_whole_experts,
    tensor_headers,
    weight_files,
)
from decoder.errors import UserError, explained
from decoder.model.loading import base_of_weights
from decoder.model.support import hidden_dtype

from .mtp_head import MtpHead

_SCALE = "_scale_inv"  # follows the name of an FP8 matrix: what its blocks are multiplied by
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Per-layer fields of the families' configurations, for a model of one layer with experts or not.
_SPARSE: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "mlp_layer_types": ["sparse"],
    "moe_layer_start_index": 0,
    "moe_layer_end_index": 0,
    "moe_layer_interval": 1,
}
_DENSE = _SPARSE | {
    "first_k_dense_replace": 1,
    "mlp_only_layers": [0],
    "mlp_layer_types": ["dense"],
    "moe_layer_start_index": 1,
}


def load_mtp(path: str | Path, target: Any) -> list[MtpHead]:
    """The heads of a checkpoint, in the order of their turns, on the target's device.

    Args:
        path: a folder with the heads' tensors, by the names that they have beside a target's.
        target: the loaded target.

    Raises:
        UserError: a file is missing or broken, there is no head, or its tensors are not those of
            one for this target.
    """
    folder = model_folder(path, "MTP head")
    depth = target.config.get_text_config(decoder=True).num_hidden_layers
    with explained(f"cannot load the MTP head in {folder}"):
        files = weight_files(folder)
        headers = tensor_headers(files)
        found = mtp_heads(headers, depth)
        if found is None:
            known = (
                f"{layout.parts(depth, 0)['projection']}.weight ({layout.family})"
                for layout in MTP_LAYOUTS
            )
            raise UserError(
                f"{folder} has no MTP head for a target of {depth} layers: expected a tensor "
                f"named {' or '.join(known)}"
            )
        layout, heads = found
        loaded = []
        for i, names in enumerate(heads):
            require_whole_experts({name: headers[name] for name in names.values()})
            read = read_tensors(files, names.values())
            weights = {ours: read[theirs] for ours, theirs in names.items()}
            _unpack(weights, names, _block(folder), hidden_dtype(target))
            parts = layout.parts(depth, i)
            _check_parts(f"MTP head in {folder}", parts, weights, names, target)
            loaded.append(_head(folder, layout, weights, target))
    return loaded


def _head(folder: Path, layout: MtpLayout, weights: dict[str, Tensor], target: Any) -> MtpHead:
    dtype, device = hidden_dtype(target), target.get_input_embeddings().weight.device
    layer = {name: weights.pop(name) for name in list(weights) if name.startswith("layer.")}
    norm = weights.pop("norm.weight", None)
    base_weights = {f"layers.0.{name.removeprefix('layer.')}": t for name, t in layer.items()}
    base_weights["norm.weight"] = target.get_decoder().norm.weight if norm is None else norm
    base_weights["embed_tokens.weight"] = torch.zeros(1, len(base_weights["norm.weight"]))
    config = _one_layer(target, sparse=any(".experts." in name for name in layer))
    base = base_of_weights(type(target.get_decoder()), config, base_weights, folder, dtype)
    _leave_out_copies(weights, target)
    parts = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
    head = MtpHead(base.to(device), parts, target, hidden_first=layout.hidden_first)
    return head.to(device).eval()


def _one_layer(target: Any, sparse: bool) -> Any:
    """The target's configuration with one layer and, as the head is given embeddings, one token."""
    config = copy.deepcopy(target.config.get_text_config(decoder=True))
    fields = {
        "num_hidden_layers": 1,
        "vocab_size": 1,
        "pad_token_id": None,
        "layer_types": ["full_attention"],
        **(_SPARSE if sparse else _DENSE),
    }
    for name, value in fields.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    if hasattr(config, "quantization_config"):  # of tensors that are unpacked by now
        del config.quantization_config
    return config


def _block(folder: Path) -> tuple[int, int]:
    """Rows and columns of an FP8 matrix that have one scale."""
    fields = read_json(folder / CONFIG).get("quantization_config") or {}
    sides = fields.get("weight_block_size") or (128, 128)
    if len(sides) != 2 or not all(map(is_positive, sides)):
        raise UserError(f"{folder / CONFIG}: weight_block_size must be two sizes, got {sides!r}")
    return sides[0], sides[1]


def _unpack(
    weights: dict[str, Tensor], names: Mapping[str, str], block: tuple[int, int], dtype: torch.dtype
) -> None:
    """FP8 matrices become the product with their scales, in ``dtype``."""
    scales = {name: weights.pop(name) for name in list(weights) if name.endswith(_SCALE)}
    for name, weight in weights.items():
        scale = scales.pop(f"{name}{_SCALE}", None)
        if weight.dtype in _FP8 and scale is not None:
            weights[name] = _times_blocks(weight, scale, block, names[name]).to(dtype)
        elif not weight.is_floating_point() or weight.element_size() < 2 or scale is not None:
            raise UserError(
                f"{names[name]} must be fp64, fp32, fp16, bf16 or FP8 with blocks' scales "
                f"({names[name]}{_SCALE}), got {weight.dtype}"
            )
    if scales:
        raise UserError(f"scales without a matrix: {few([names[name] for name in scales])}")


def _times_blocks(weight: Tensor, scale: Tensor, block: tuple[int, int], name: str) -> Tensor:
    """``[N, K]`` times ``[ceil(N / n), ceil(K / k)]``, fp32."""
    expected = tuple(-(-size // side) for size, side in zip(weight.shape, block, strict=False))
    if weight.ndim != 2 or tuple(scale.shape) != expected:
        raise UserError(
            f"{name}{_SCALE} must be {expected}, a scale per block of {block}, got "
            f"{tuple(scale.shape)} for {tuple(weight.shape)}"
        )
    rows, columns = (torch.arange(n) // side for n, side in zip(weight.shape, block, strict=True))
    return weight.float() * scale.float()[rows][:, columns]


def _check_parts(
    where: str,
    parts: Mapping[str, str],
    weights: Mapping[str, Tensor],
    names: Mapping[str, str],
    target: Any,
) -> None:
    """What stands around the layer is there, and of the target's width.

    ``parts`` and ``names``: ours of a module and of a tensor to the checkpoint's.
    """
    config = target.config.get_text_config(decoder=True)
    tokens, H = config.vocab_size, config.hidden_size
    shapes: dict[str, tuple[int | None, ...]] = {
        "embedding_norm.weight": (H,),
        "hidden_norm.weight": (H,),
        "norm.weight": (H,),
        "projection.weight": (H, 2 * H),
        "projection.bias": (H,),
        "embedding.weight": (None, H),
        "lm_head.weight": (None, H),
    }
    needed = [part for part in parts if part not in ("embedding", "lm_head")]
    if missing := [parts[part] for part in needed if f"{part}.weight" not in weights]:
        raise UserError(f"{where} lacks {few([f'{name}.weight' for name in missing])}")
    for name, weight in weights.items():
        if name.startswith("layer."):
            continue
        if name not in shapes:
            raise UserError(f"{where} has a tensor of no known head: {names[name]}")
        shape, got = shapes[name], tuple(weight.shape)
        fits = len(got) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, got, strict=True)
        )
        if not fits or (name == "embedding.weight" and got[0] < tokens):
            text = ", ".join("any" if size is None else str(size) for size in shape)
            raise UserError(
                f"{where}: {names[name]} must be ({text}) for the target, with {tokens} tokens, "
                f"got {got}"
            )


def _leave_out_copies(weights: dict[str, Tensor], target: Any) -> None:
    """An embedding or output projection that is the target's own is kept once."""
    own = target.get_input_embeddings(), target.get_output_embeddings()
    for name, module in zip(("embedding.weight", "lm_head.weight"), own, strict=True):
        given, weight = weights.get(name), module.weight
        if given is None or given.shape != weight.shape:
            continue
        if torch.equal(given.to(weight.device, weight.dtype), weight):
            del weights[name]

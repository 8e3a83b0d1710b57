"""Bytes that a model's weights take once it is loaded, by the headers of its files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decoder.checkpoint.weights import TensorHeader, tensor_headers, weight_files
from decoder.errors import UserError
from decoder.model.kernels import gguf_config, gguf_file
from decoder.perf_model.model_spec import WEIGHT_BYTES

if TYPE_CHECKING:
    from decoder.perf_model.model_spec import ModelSpec

# Of a GGUF file: the table that is looked up, and what the names of experts have in them.
_EMBEDDING, _EXPERTS = "token_embd.weight", "_exps."
_GATE_OR_UP = re.compile(r"(.*)\.ffn_(gate|up)_exps\.weight")
_PLAIN_BYTES = WEIGHT_BYTES["bf16"]
# Of safetensors: weights in an element of a packed tensor, and bytes of an element.
_PACKED = {"F8_E4M3": 1, "I8": 1, "U8": 2}
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_SCALE = re.compile(r".*_scale(s|_inv)?")


def gguf_spec(file: Path) -> ModelSpec:
    """The model of a GGUF file, a weight with the mean of the bytes that steps read for one."""
    from decoder.perf_model.config_spec import spec_from_config

    source = gguf_file(file)
    spec = spec_from_config(gguf_config(source), file.stem)
    read = [tensor for tensor in source.tensors.values() if len(tensor.shape) > 1]
    if not spec.tied:
        read = [tensor for tensor in read if tensor.name != _EMBEDDING]
    experts = [tensor for tensor in read if _EXPERTS in tensor.name]
    dense = [tensor for tensor in read if _EXPERTS not in tensor.name]
    expert_bytes = _mean_bytes(experts, _unpacked(experts)) if experts else None
    return spec.with_weight_bytes(_mean_bytes(dense), expert_bytes, _PLAIN_BYTES)


def _unpacked(experts: Iterable[Any]) -> set[str]:
    """Names of gates and ups in two formats: they are one matrix in memory, of plain numbers."""
    kinds: dict[str, dict[str, str]] = {}
    for tensor in experts:
        if match := _GATE_OR_UP.fullmatch(tensor.name):
            kinds.setdefault(match[1], {})[tensor.name] = tensor.kind
    return {name for both in kinds.values() if len({*both.values()}) > 1 for name in both}


def _mean_bytes(tensors: Iterable[Any], unpacked: Iterable[str] = ()) -> float:
    """Bytes of a weight: those of the file's blocks, or bf16, in which the rest is loaded."""
    plain = set(unpacked)
    weights = {tensor: math.prod(tensor.shape) for tensor in tensors}
    size = sum(
        x.size if x.packed and x.name not in plain else _PLAIN_BYTES * count
        for x, count in weights.items()
    )
    return float(size / sum(weights.values()))


def as_in_files(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The model of a folder, a weight with the mean of the bytes of those that are packed there.

    A configuration alone says no more than how most of them are.

    Args:
        spec: as the folder's configuration describes it.
        folder: with or without weights; whatever cannot be read leaves ``spec`` as it is.
    """
    plain = spec.kv_bytes
    try:
        headers = tensor_headers(weight_files(folder))
    except UserError:
        return spec
    matrices = {
        name: header
        for name, header in headers.items()
        # One scale for a row is a vector in files of some releases of transformers.
        if (len(header.shape) > 1 and not name.endswith("bias")) or _SCALE.fullmatch(name)
    }
    if not spec.tied:
        matrices = {n: h for n, h in matrices.items() if not n.endswith("embed_tokens.weight")}
    experts = {name: matrices[name] for name in matrices if ".experts." in name}
    dense = {name: matrices[name] for name in matrices.keys() - experts}
    means = [_mean_of(part, plain) for part in (dense, experts)]
    if means[0] is None:
        return spec
    return spec.with_weight_bytes(means[0], means[1] or spec.expert_bytes, spec.embedding_bytes)


def _mean_of(tensors: dict[str, TensorHeader], plain: float) -> float | None:
    """Bytes of a weight, scales included; ``None`` without weights, or of a type not known here.

    Args:
        plain: bytes of a number that is not packed, once it is loaded.
    """
    size, weights = 0.0, 0
    for name, header in tensors.items():
        if _SCALE.fullmatch(name):
            size += header.numel * _SIZES.get(header.dtype, 1)
        elif header.dtype in _SIZES:
            size, weights = size + header.numel * plain, weights + header.numel
        elif header.dtype in _PACKED:
            size, weights = size + header.numel, weights + header.numel * _PACKED[header.dtype]
        else:
            return None
    return size / weights if weights else None

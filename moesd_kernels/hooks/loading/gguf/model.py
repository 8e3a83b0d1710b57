"""``load_gguf``: a model out of a GGUF file whose matrices stay in the file's blocks.

Rows of blocks are moved as they are. The embedding, which is looked up, is unpacked, and a head
that shares its matrix reads the blocks. Every name and shape is compared with the file's before
memory is taken for any.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesd_kernels.formats import WEIGHT_FORMATS, KeepsScales, QuantizedLinear
from moesd_kernels.hooks.quantize import hold_quantized

from .config import config_of, end_tokens
from .families import (
    EMBEDDING,
    GATE_AND_UP,
    GATE_UP,
    HEAD,
    LAYER,
    OUTSIDE,
    SHARED_GATE,
    Family,
    K,
    Q,
)
from .file import GgufFile

logger = logging.getLogger(__name__)

_LAYERS = "model.layers."
_FREQUENCIES = "rope_freqs.weight"
_DOWN = "mlp.experts.down_proj"


def load_gguf(file: str | Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal LM in evaluation mode; ``accelerate`` it: its forwards unpack at each call without.

    ``save_pretrained`` refuses it, unless all of its weights are plain numbers.

    Args:
        file: a GGUF file of a family in ``FAMILIES``.
        dtype: of hidden states, norms, biases and the embedding.

    Raises:
        OSError: no such file.
        ValueError: a damaged file, another architecture, a type of tensors that is not read, or
            tensors that are not those of the model that the metadata describes.
    """
    from transformers import AutoModelForCausalLM

    from .kept import KeptBlocks

    source = GgufFile(file)
    config, family = config_of(source)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    names = _names_in_file(model, source)
    rotary = type(model.model.rotary_emb)(config=config)  # its buffers are in no file
    if _FREQUENCIES in source.tensors:
        _slow_down(rotary, source)
    model.model.rotary_emb = rotary
    split = 0
    for name, theirs in names.items():
        owner, _, leaf = name.rpartition(".")
        part = name.removeprefix(_LAYERS).partition(".")[2]
        paired = _paired_heads(name, config, family)
        if part == _DOWN:
            split += _fill_experts(model.get_submodule(owner), source, names, owner, dtype)
        elif name == EMBEDDING or part == GATE_UP:
            continue
        elif type(module := model.get_submodule(owner)) is nn.Linear and leaf == "weight":
            _fill_linear(model, owner, module, source, theirs[0], paired, dtype)
        else:
            own = model.get_parameter(name)
            setattr(module, leaf, _parameter(source.values(theirs[0], dtype).view(own.shape)))
    _fill_embedding(model, source, dtype)
    if split:
        logger.warning(
            "gate and up projections of the experts of %d layers are unpacked: two formats",
            split,
        )
    if model.generation_config is not None:
        model.generation_config.eos_token_id = end_tokens(source)
    if any(isinstance(module, KeepsScales) for module in model.modules()):
        model.hf_quantizer = KeptBlocks()
    return model.eval()


def dense_weights(source: GgufFile) -> dict[str, Tensor]:
    """All weights of a model without experts, unpacked to fp32, by transformers' names.

    Raises:
        ValueError: as ``load_gguf``, or a model with experts.
    """
    from transformers import AutoModelForCausalLM

    config, family = config_of(source)
    if family.sparse:
        raise ValueError(f"{source.path} must hold a model without experts")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = {}
    for name, (theirs,) in _names_in_file(model, source).items():
        weight, heads = source.values(theirs, torch.float32), _paired_heads(name, config, family)
        weights[name] = weight if heads is None else _halved(weight, heads)
    return weights


def _paired_heads(name: str, config: Any, family: Family) -> int | None:
    """Heads of a projection whose rotary pairs a file has side by side, else None."""
    heads = {Q: config.num_attention_heads, K: config.num_key_value_heads}
    part = name.removeprefix(_LAYERS).partition(".")[2]
    return heads.get(part) if family.rotary_pairs else None


def _names_in_file(model: Any, source: GgufFile) -> dict[str, list[str]]:
    """The file's tensors of each of the model's weights.

    Raises:
        ValueError: one is missing, left over, or of another shape than the metadata says.
    """
    names, left = {}, set(source.tensors) - {_FREQUENCIES}
    for name, own in model.named_parameters():
        layer, _, part = name.removeprefix(_LAYERS).partition(".")
        if name in OUTSIDE:
            theirs = [OUTSIDE[name]]
        else:
            parts = GATE_AND_UP if part == GATE_UP else (LAYER[part],)
            theirs = [f"blk.{layer}.{one}" for one in parts]
        shape = tuple(own.shape)
        if part == GATE_UP:
            shape = (shape[0], shape[1] // 2, shape[2])
        elif part == SHARED_GATE:
            shape = shape[1:]
        for one in theirs:
            if one not in source.tensors:
                raise ValueError(f"{source.path} has no {one}, which its metadata asks for")
            if (got := source.tensors[one].shape) != shape:
                raise ValueError(
                    f"{source.path}: {one} must be {shape} as its metadata says, got {got}"
                )
        left -= set(theirs)
        names[name] = theirs
    if left:
        raise ValueError(
            f"{source.path} has {len(left)} tensors that are none of its model's: {min(left)}"
        )
    return names


def _slow_down(rotary: Any, source: GgufFile) -> None:
    """Divide the rotary embedding's frequencies as a file tells, which is how Llama 3.1 has it."""
    factors = source.values(_FREQUENCIES, torch.float32)
    if factors.shape != rotary.inv_freq.shape:
        want, got = tuple(rotary.inv_freq.shape), tuple(factors.shape)
        raise ValueError(f"{source.path}: {_FREQUENCIES} must be {want}, got {got}")
    rotary.inv_freq = rotary.inv_freq / factors
    rotary.original_inv_freq = rotary.inv_freq.clone()


def _fill_linear(
    model: Any,
    owner: str,
    module: nn.Linear,
    source: GgufFile,
    name: str,
    paired: int | None,
    dtype: torch.dtype,
) -> None:
    """Let a linear layer keep its blocks, or have the file's numbers."""
    stored = source.tensors[name]
    weight = source.tensor(name)
    if paired is not None:
        weight = _halved(weight, paired)
    if not stored.packed:
        module.weight = _parameter(weight.to(dtype).view(module.weight.shape))
        return
    quantized = QuantizedLinear(weight, None, None, WEIGHT_FORMATS[stored.kind])
    quantized.bias = module.bias  # assigned later, or already
    model.set_submodule(owner, quantized)


def _fill_experts(
    experts: Any, source: GgufFile, names: dict[str, list[str]], owner: str, dtype: torch.dtype
) -> bool:
    """Both projections, packed where they can be; whether two formats kept gate and up from it."""
    gate_up, down = names[f"{owner}.gate_up_proj"], names[f"{owner}.down_proj"]
    kinds, weights = [], {}
    for name, parts in (("gate_up_proj", gate_up), ("down_proj", down)):
        found = {source.tensors[part].kind for part in parts}
        kind = min(found) if len(found) == 1 and found <= WEIGHT_FORMATS.keys() else "plain"
        packed = kind != "plain"
        read = [source.tensor(p) if packed else source.values(p, dtype) for p in parts]
        weights[name] = torch.cat(read, dim=1) if len(read) > 1 else read[0]
        kinds.append(kind)
    if kinds == ["plain", "plain"]:
        for name, weight in weights.items():
            setattr(experts, name, _parameter(weight))
    else:
        hold_quantized(experts, kinds[0], {n: (w, None) for n, w in weights.items()}, kinds[1])
    return kinds[0] == "plain" and any(source.tensors[part].packed for part in gate_up)


def _fill_embedding(model: Any, source: GgufFile, dtype: torch.dtype) -> None:
    """The table that is looked up; a head that shares it reads its blocks where it has any."""
    name = OUTSIDE[EMBEDDING]
    stored = source.tensors[name]
    model.get_input_embeddings().weight = _parameter(source.values(name, dtype))
    if not model.config.tie_word_embeddings:
        return
    if not stored.packed:
        model.tie_weights()
        return
    model.config.tie_word_embeddings = False
    getattr(model, "all_tied_weights_keys", {}).pop(HEAD, None)
    head = QuantizedLinear(source.tensor(name), None, None, WEIGHT_FORMATS[stored.kind])
    model.set_output_embeddings(head)


def _halved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, or their blocks, with rotary pairs half a head apart."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)

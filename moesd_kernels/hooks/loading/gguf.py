"""``load_gguf``: a model out of a GGUF file whose matrices stay in the file's blocks.

transformers reads such a file's configuration, names and order of rows; it unpacks every tensor of
the architectures that are listed here, which we do not: rows of blocks are moved as they are. The
embedding, which is looked up, is unpacked, and a head that shares its matrix reads the blocks.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesd_kernels.formats import WEIGHT_FORMATS, QuantizedLinear
from moesd_kernels.hooks.quantize import hold_quantized

logger = logging.getLogger(__name__)

# Architectures whose tensors become transformers' by renaming, and by moving rows at most.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe")
_EXPERTS = re.compile(r"(.*)\.ffn_(gate|up|down)_exps\.weight")
_EMBEDDING = "token_embd.weight"
_EXPERT_WIDTHS = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}


def load_gguf(file: str | Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal LM in evaluation mode; ``accelerate`` it: its forwards unpack at each call without.

    Args:
        file: a GGUF file of one of ``ARCHITECTURES``.
        dtype: of hidden states, norms, biases and the embedding.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        NotImplementedError: another architecture.
        ValueError: a weight of the model is not in the file.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    file = Path(file)
    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    if architecture not in ARCHITECTURES:
        raise NotImplementedError(
            f"moesd reads GGUF files of {', '.join(ARCHITECTURES)}, got {architecture!r}"
        )
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    for name, key in _EXPERT_WIDTHS.items():  # which transformers leaves at its defaults
        field = reader.fields.get(f"{architecture}.{key}")
        if field is not None and hasattr(config, name):
            setattr(config, name, field.contents())
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)  # its buffers are in no file
    _fill(model, reader, architecture, dtype)
    lost = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if lost:
        raise ValueError(f"{file} has no {lost[0]}, one of {len(lost)} weights of its model")
    eos = reader.fields.get("tokenizer.ggml.eos_token_id")
    if eos is not None and model.generation_config is not None:
        model.generation_config.eos_token_id = eos.contents()
    return model.eval()


def _fill(model: Any, reader: Any, architecture: str, dtype: torch.dtype) -> None:
    """Give the model the file's tensors, packed where a module can hold them so."""
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    kept = _kept_formats(reader)
    experts: dict[str, Any] = {"tensors": {}}
    for stored in reader.tensors:
        packed = stored.name in kept
        data = stored.data if packed else dequantize(stored.data, stored.tensor_type)
        moved = processor.process(
            weights=data, name=stored.name, tensor_key_mapping=names, parsed_parameters=experts
        )
        if moved.name is None:  # a projection of experts, which is put together there
            continue
        tensor = torch.tensor(moved.weights)
        if stored.name == _EMBEDDING and model.config.tie_word_embeddings:
            _fill_tied(model, tensor, kept.get(stored.name), dtype)
        elif packed:
            _hold(model, names[stored.name], tensor, kept[stored.name])
        else:
            _assign(model, names.get(stored.name), tensor.to(dtype))
    by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in experts["tensors"].items():
        owner, _, leaf = name.rpartition(".")
        by_module[owner][leaf] = tensor
    for owner, tensors in by_module.items():
        layer = re.sub(r"model\.layers\.(\d+)\..*", r"blk.\1.ffn_down_exps.weight", owner)
        if layer in kept:
            known = WEIGHT_FORMATS[kept[layer]]
            for leaf, tensor in tensors.items():
                logical = (*tensor.shape[:-1], known.depth(tensor))
                own = model.get_parameter(f"{owner}.{leaf}")
                _require_shape(f"{owner}.{leaf}", logical, tuple(own.shape))
            stored_as = {name: (tensor, None) for name, tensor in tensors.items()}
            hold_quantized(model.get_submodule(owner), kept[layer], stored_as)
        else:
            for leaf, tensor in tensors.items():
                _assign(model, f"{owner}.{leaf}", tensor.to(dtype))


def _kept_formats(reader: Any) -> dict[str, str]:
    """The tensors that stay packed, and their formats: three of an expert layer all or none."""
    formats = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    kept = {name: kind for name, kind in formats.items() if kind in WEIGHT_FORMATS}
    layers = {match[1] for name in formats if (match := _EXPERTS.fullmatch(name))}
    mixed = 0
    for layer in layers:
        three = [f"{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
        if len({kept.get(name) for name in three}) > 1:
            mixed += 1
            for name in three:
                kept.pop(name, None)
    if mixed:
        logger.warning(
            "the experts of %d layers are unpacked: their projections are in more than one format",
            mixed,
        )
    return kept


def _hold(model: Any, name: str, weight: Tensor, kind: str) -> None:
    """Let a linear layer keep its blocks; a table that is looked up is unpacked."""
    owner = name.removesuffix(".weight")
    module = model.get_submodule(owner)
    known = WEIGHT_FORMATS[kind]
    if type(module) is nn.Linear:
        _require_shape(name, (weight.shape[0], known.depth(weight)), tuple(module.weight.shape))
        bias = module.bias  # assigned later, or already
        quantized = QuantizedLinear(weight, None, None, known)
        quantized.bias = bias
        model.set_submodule(owner, quantized)
    else:
        _assign(model, name, known.decode(weight, None).to(model.dtype))


def _fill_tied(model: Any, table: Tensor, kind: str | None, dtype: torch.dtype) -> None:
    """The one matrix of embedding and head: unpacked for the one, in its blocks for the other."""
    embedding = model.get_input_embeddings()
    if kind is None:
        embedding.weight = nn.Parameter(table.to(dtype), requires_grad=False)
        model.tie_weights()
        return
    known = WEIGHT_FORMATS[kind]
    embedding.weight = nn.Parameter(known.decode(table, None).to(dtype), requires_grad=False)
    model.config.tie_word_embeddings = False
    getattr(model, "all_tied_weights_keys", {}).clear()
    model.set_output_embeddings(QuantizedLinear(table, None, None, known))


def _assign(model: Any, name: str | None, tensor: Tensor) -> None:
    if name is None:  # such as frequencies, which the configuration has
        return
    _require_shape(name, tuple(tensor.shape), tuple(model.get_parameter(name).shape))
    owner, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(model.get_submodule(owner), leaf, parameter)


def _require_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise ValueError(f"{name} must be {expected} as the file's metadata says, got {got}")

"""A file of ``bench.gguf.writer``, or what llama.cpp made of it, as a model of transformers.

Quantised matrices stay the blocks they are, rows of gate and up one below the other; the embedding,
norms and routers become numbers. transformers itself takes such a Mixtral for a dense Llama, and
turns a Qwen3-MoE's blocks into numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.gguf.families import FAMILIES, GATE_AND_UP, HEAD, LAYER, OUTSIDE, Family, K, Q
from moesd_kernels import quantize_experts
from moesd_kernels.formats import WEIGHT_FORMATS, QuantizedLinear

_NUMBERS = {"f32", "f16", "bf16"}


class _File:
    """Tensors by llama.cpp's names, and the family's fields."""

    def __init__(self, file: Path) -> None:
        from gguf import GGUFReader

        self.file, reader = file, GGUFReader(file)
        self.fields, self.tensors = reader.fields, {t.name: t for t in reader.tensors}
        self.architecture = self.fields["general.architecture"].contents()

    def field(self, name: str) -> Any:
        """A field of the architecture."""
        return self.fields[f"{self.architecture}.{name}"].contents()

    def format(self, name: str) -> str:
        """A tensor's weight format, ``plain`` where it is stored as numbers.

        Raises:
            ValueError: blocks that we do not read.
        """
        stored = self.tensors[name].tensor_type.name.lower()
        if stored in _NUMBERS:
            return "plain"
        if stored not in WEIGHT_FORMATS:
            raise ValueError(f"{self.file}: {name} is {stored}, read are {', '.join(_readable())}")
        return stored

    def blocks(self, name: str) -> Tensor:
        """A quantised tensor ``[..., R, bytes of a row]``."""
        return torch.tensor(self.tensors[name].data)

    def numbers(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor's values."""
        from gguf import dequantize

        stored = self.tensors[name]
        shape = [int(size) for size in reversed(stored.shape)]
        if stored.tensor_type.name == "BF16":  # as they lie: dequantize would make fp32 of them
            return torch.tensor(stored.data).view(torch.bfloat16).view(shape).to(dtype)
        return torch.tensor(dequantize(stored.data, stored.tensor_type)).view(shape).to(dtype)


def _readable() -> list[str]:
    return [name for name in WEIGHT_FORMATS if name.startswith("q")]


def read_gguf(file: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model, in evaluation mode on the CPU.

    Args:
        file: Mixtral or Qwen3-MoE.
        dtype: of hidden states and of whatever is not quantised.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        ValueError: another architecture, or blocks that we do not read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = _File(file)
    kinds = {family.architecture: kind for kind, family in FAMILIES.items()}
    if (
        source.architecture not in kinds
        or f"{source.architecture}.expert_count" not in source.fields
    ):
        raise ValueError(f"{file} must be a sparse {' or '.join(kinds)}, got {source.architecture}")
    kind = kinds[source.architecture]
    config = AutoConfig.for_model(kind, **_config(source, FAMILIES[kind]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):
            model.set_submodule(name, type(module)(config))
    _fill(model, source, FAMILIES[kind], dtype)
    return model.eval()


def _config(source: _File, family: Family) -> dict[str, Any]:
    return {
        **{name: source.field(key) for name, key in family.sizes.items()},
        **family.wanted,
        "rope_parameters": {"rope_type": "default", "rope_theta": source.field("rope.freq_base")},
        "tie_word_embeddings": OUTSIDE[HEAD] not in source.tensors,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _fill(model: Any, source: _File, family: Family, dtype: torch.dtype) -> None:
    """Put the file's tensors in the place of a model's on the "meta" device."""
    config = model.config
    for name, theirs in OUTSIDE.items():
        if theirs in source.tensors:
            _set(model, name, source.numbers(theirs, dtype))
    head = OUTSIDE["model.embed_tokens.weight" if config.tie_word_embeddings else HEAD]
    if (stored := source.format(head)) != "plain":
        _set_linear(model, HEAD, source.blocks(head), stored)
        config.tie_word_embeddings = False
        getattr(model, "all_tied_weights_keys", {}).pop(HEAD, None)
    model.tie_weights()
    heads = {Q: config.num_attention_heads, K: config.num_key_value_heads}
    for index, layer in enumerate(model.model.layers):
        for name, theirs in LAYER.items():
            key = f"blk.{index}.{theirs}"
            if key not in source.tensors or ".experts." in name:
                continue
            stored = source.format(key)
            weight = source.numbers(key, dtype) if stored == "plain" else source.blocks(key)
            if family.rotary_pairs and name in heads:
                weight = _halved(weight, heads[name])
            if stored == "plain":
                _set(layer, name, weight)
            else:
                _set_linear(layer, name, weight, stored)
        _fill_experts(layer.mlp.experts, source, f"blk.{index}.", dtype)


def _fill_experts(experts: Any, source: _File, block: str, dtype: torch.dtype) -> None:
    gate_up = [f"{block}{name}" for name in GATE_AND_UP]
    names = [*gate_up, f"{block}{LAYER['mlp.experts.down_proj']}"]
    formats = {source.format(name) for name in names}
    if len(formats) > 1:
        raise ValueError(f"{source.file}: experts of {block} must be alike, got {sorted(formats)}")
    (stored,) = formats
    if stored == "plain":
        gate, up, down = (source.numbers(name, dtype) for name in names)
    else:
        # A class that reads a format: made for integers, it reads any that its module names.
        quantize_experts(experts, "int8")
        experts.weight_format = stored
        experts.gate_up_proj_scale = experts.down_proj_scale = None
        gate, up, down = map(source.blocks, names)
    experts.gate_up_proj = _parameter(torch.cat((gate, up), dim=1))
    experts.down_proj = _parameter(down)


def _halved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, or their blocks, with rotary pairs half a head apart."""
    pairs = weight.view(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _set_linear(model: nn.Module, name: str, weight: Tensor, stored: str) -> None:
    linear = QuantizedLinear(weight, None, None, WEIGHT_FORMATS[stored])
    model.set_submodule(name.removesuffix(".weight"), linear)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    module, _, parameter = name.rpartition(".")
    setattr(model.get_submodule(module), parameter, _parameter(value))


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)

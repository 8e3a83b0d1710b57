"""A sparse-MoE model in memory as a GGUF file of bf16 matrices.

Two families, those of our own models: Mixtral, which is llama.cpp's ``llama`` with experts, and
Qwen3-MoE. Matrices are written in bf16 as they lie in memory, norms and routers in fp32, as
llama.cpp's own converter has it: nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gguf.tokens import add_tokens
from moesd_kernels.hooks.loading.gguf.families import (
    FAMILIES,
    GATE_AND_UP,
    GATE_UP,
    HEAD,
    LAYER,
    OUTSIDE,
    ROUTER,
    Family,
    K,
    Q,
)

_WRITTEN = ("mixtral", "qwen3_moe")


def write_gguf(model: Any, file: Path, tokenizer: Any | None = None) -> bool:
    """Write a model's weights, and its tokens where llama.cpp has a name for how text is split.

    Args:
        model: a Mixtral or Qwen3-MoE of transformers, plain weights in bf16, on the CPU.
        file: written anew.
        tokenizer: its fast tokenizer, or None: token ids alone will do for measurements.

    Returns:
        Whether tokens were written. A file without them serves token ids only.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        ValueError: a family, configuration, dtype or tensor that is not written here.
    """
    from gguf import GGUFWriter, LlamaFileType

    if model.dtype != torch.bfloat16:
        raise ValueError(f"the model must be in bf16, got {model.dtype}")
    config = model.config
    family = _family(config)
    writer = GGUFWriter(file, family.architecture)
    writer.add_name(file.stem)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(2)
    _add_sizes(writer, config, family)
    with_tokens = add_tokens(writer, tokenizer, config.vocab_size)
    for name, tensor in _tensors(model, family):
        _add_tensor(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return with_tokens


def _family(config: Any) -> Family:
    if config.model_type not in _WRITTEN:
        raise ValueError(f"expected one of {', '.join(_WRITTEN)}, got {config.model_type}")
    family = FAMILIES[config.model_type]
    got = {name: getattr(config, name, value) for name, value in family.wanted.items()}
    if got != family.wanted:
        raise ValueError(f"llama.cpp's {family.architecture} wants {family.wanted}, got {got}")
    if (rope := config.rope_parameters)["rope_type"] != "default":
        raise ValueError(f"rotary embeddings must be of type default, got {rope['rope_type']}")
    return family


def _add_sizes(writer: Any, config: Any, family: Family) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, key in family.sizes.items():
        value = head if name == "head_dim" else getattr(config, name)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{family.architecture}.{key}", value)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _tensors(model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and tensors, in the model's order."""
    config = model.config
    heads = {Q: config.num_attention_heads, K: config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        if name in OUTSIDE:
            yield OUTSIDE[name], tensor
            continue
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        if part == GATE_UP:
            halves = tensor.chunk(2, dim=1)  # [E, I, H] each
            for half_name, half in zip(GATE_AND_UP, halves, strict=True):
                yield f"blk.{layer}.{half_name}", half
            continue
        if part not in LAYER:
            raise ValueError(f"llama.cpp's {family.architecture} has no tensor for {name}")
        if family.rotary_pairs and part in heads:
            tensor = _paired(tensor, heads[part])
        yield f"blk.{layer}.{LAYER[part]}", tensor.float() if part == ROUTER else tensor


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection with the two of each rotary pair side by side."""
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add_tensor(writer: Any, name: str, tensor: Tensor) -> None:
    from gguf import GGMLQuantizationType

    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
    else:
        data = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.BF16)

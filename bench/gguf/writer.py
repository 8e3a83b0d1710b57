"""A sparse-MoE model in memory as a GGUF file of bf16 matrices.

Two families, those of our own models: Mixtral, which is llama.cpp's ``llama`` with experts, and
Qwen3-MoE. Matrices are written in bf16 as they lie in memory, norms and routers in fp32, as
llama.cpp's own converter has it: nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gguf.tokens import add_tokens

_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
_GATE_UP = "mlp.experts.gate_up_proj"
_ROUTER = "mlp.gate.weight"


@dataclass(frozen=True, slots=True)
class _Family:
    """What llama.cpp calls a family, and what it takes for granted about it.

    Attributes:
        width: the configuration's name of an expert's width.
        rotary_pairs: whether the two rows that the rotary embedding turns together lie side by
            side in a query or key projection; else half a head apart, as transformers has them.
        wanted: configuration that llama.cpp does not read from a file.
    """

    architecture: str
    width: str
    rotary_pairs: bool
    wanted: dict[str, Any]


_FAMILIES = {
    "mixtral": _Family("llama", "intermediate_size", True, {"sliding_window": None}),
    "qwen3_moe": _Family(
        "qwen3moe",
        "moe_intermediate_size",
        False,
        {
            "norm_topk_prob": True,
            "sliding_window": None,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
        },
    ),
}


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


def _family(config: Any) -> _Family:
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(f"expected one of {', '.join(_FAMILIES)}, got {config.model_type}")
    wanted = family.wanted | {"hidden_act": "silu"}
    got = {name: getattr(config, name, value) for name, value in wanted.items()}
    if got != wanted:
        raise ValueError(f"llama.cpp's {family.architecture} wants {wanted}, got {got}")
    if (rope := config.rope_parameters)["rope_type"] != "default":
        raise ValueError(f"rotary embeddings must be of type default, got {rope['rope_type']}")
    return family


def _add_sizes(writer: Any, config: Any, family: _Family) -> None:
    width = getattr(config, family.width)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(width)
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(model: Any, family: _Family) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and tensors, in the model's order."""
    config = model.config
    heads = {
        "self_attn.q_proj.weight": config.num_attention_heads,
        "self_attn.k_proj.weight": config.num_key_value_heads,
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name in _OUTSIDE:
            yield _OUTSIDE[name], tensor
            continue
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        if part == _GATE_UP:
            gate, up = tensor.chunk(2, dim=1)  # [E, I, H] each
            yield f"blk.{layer}.ffn_gate_exps.weight", gate
            yield f"blk.{layer}.ffn_up_exps.weight", up
            continue
        if part not in _LAYER:
            raise ValueError(f"llama.cpp's {family.architecture} has no tensor for {name}")
        if family.rotary_pairs and part in heads:
            tensor = _paired(tensor, heads[part])
        yield f"blk.{layer}.{_LAYER[part]}", tensor.float() if part == _ROUTER else tensor


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

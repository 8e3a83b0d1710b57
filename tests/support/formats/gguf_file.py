"""Small GGUF files of random models, written with the package ``gguf``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import torch
from support.formats import stored_weight
from torch import Tensor

from moesd_kernels.formats import WEIGHT_FORMATS

VOCAB = 64


class Sizes(NamedTuple):
    """Of the models: the least that every format takes."""

    hidden: int = 256
    inter: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    experts: int = 0
    shared: int = 512
    tied: bool = True


def write_gguf(
    file: Path,
    architecture: str,
    kinds: dict[str, str],
    metadata: Callable[[Any], None] = lambda writer: None,
    added: Mapping[str, Tensor] = MappingProxyType({}),
    **sizes: Any,
) -> Path:
    """A file whose matrices have the formats of ``kinds`` by part of their names, else ``""``'s.

    ``metadata`` may write more of it, and ``added`` are tensors of no size in ``sizes``.
    """
    s = Sizes(**sizes)
    writer: Any = gguf.GGUFWriter(file, architecture)
    _write_metadata(writer, s)
    metadata(writer)
    seeds = itertools.count()
    matrices, others = _tensors(architecture, s)
    for name, shape in matrices.items():
        kind = next((kinds[part] for part in kinds if part and part in name), kinds[""])
        weight, _ = stored_weight(kind, *shape, seed=next(seeds))
        assert WEIGHT_FORMATS[kind].width(shape[-1]) == weight.shape[-1]
        kind_id = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(name, weight.numpy(), raw_dtype=kind_id)
    for name, shape in others.items():
        g = torch.Generator().manual_seed(next(seeds))
        drawn = torch.randn(*shape, generator=g)
        tensor = 1 + 0.1 * drawn if len(shape) == 1 else drawn * shape[-1] ** -0.5
        writer.add_tensor(name, tensor.numpy())
    for name, tensor in added.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_metadata(writer: Any, s: Sizes) -> None:
    width = s.hidden // s.heads
    writer.add_name("random")
    writer.add_context_length(128)
    writer.add_block_count(s.layers)
    writer.add_embedding_length(s.hidden)
    writer.add_feed_forward_length(s.inter)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(VOCAB)
    writer.add_eos_token_id(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(VOCAB)])
    if s.experts:
        writer.add_expert_count(s.experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(s.inter)
        writer.add_expert_shared_feed_forward_length(s.shared)


_Shapes = dict[str, tuple[int, ...]]


def _tensors(architecture: str, s: Sizes) -> tuple[_Shapes, _Shapes]:
    """Names and shapes: of what may be packed, and of norms and routers."""
    H, I, width = s.hidden, s.inter, s.hidden // s.heads
    matrices: _Shapes = {"token_embd.weight": (VOCAB, H)}
    others: _Shapes = {"output_norm.weight": (H,)}
    if not s.tied:
        matrices["output.weight"] = (VOCAB, H)
    suffix, leading = ("_exps", (s.experts,)) if s.experts else ("", ())
    for layer in range(s.layers):
        block = f"blk.{layer}."
        others |= {f"{block}{name}_norm.weight": (H,) for name in ("attn", "ffn")}
        if architecture.startswith("qwen3"):
            others |= {f"{block}attn_{name}_norm.weight": (width,) for name in ("q", "k")}
        rows = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
        matrices |= {f"{block}attn_{n}.weight": (count * width, H) for n, count in rows.items()}
        matrices[f"{block}attn_output.weight"] = (H, s.heads * width)
        if architecture.startswith("qwen2"):
            others |= {f"{block}attn_{n}.bias": (count * width,) for n, count in rows.items()}
        if s.experts:
            others[f"{block}ffn_gate_inp.weight"] = (s.experts, H)
        if architecture == "qwen2moe":
            others[f"{block}ffn_gate_inp_shexp.weight"] = (H,)
            shared = {"gate": (s.shared, H), "up": (s.shared, H), "down": (H, s.shared)}
            matrices |= {f"{block}ffn_{part}_shexp.weight": size for part, size in shared.items()}
        sizes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
        for part, size in sizes.items():
            matrices[f"{block}ffn_{part}{suffix}.weight"] = (*leading, *size)
    return matrices, others

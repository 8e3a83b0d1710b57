"""Small GGUF files of random models, written with the package ``gguf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from support.formats import stored_weight

from moesd_kernels.formats import WEIGHT_FORMATS

VOCAB = 64


def write_gguf(
    file: Path,
    architecture: str,
    kinds: dict[str, str],
    *,
    hidden: int = 256,
    inter: int = 256,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    experts: int = 0,
    tied: bool = True,
) -> Path:
    """A file whose matrices have the formats of ``kinds`` by part of their names, else ``""``'s."""
    writer: Any = gguf.GGUFWriter(file, architecture)
    writer.add_name("random")
    writer.add_context_length(128)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inter)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_key_length(hidden // heads)
    writer.add_value_length(hidden // heads)
    writer.add_vocab_size(VOCAB)
    writer.add_eos_token_id(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(VOCAB)])
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(inter)
    seed = iter(range(10**6))

    def matrix(name: str, *shape: int) -> None:
        kind = next((kinds[part] for part in kinds if part and part in name), kinds[""])
        if kind == "f32":
            g = torch.Generator().manual_seed(next(seed))
            writer.add_tensor(name, (torch.randn(*shape, generator=g) * shape[-1] ** -0.5).numpy())
            return
        weight, _ = stored_weight(kind, *shape, seed=next(seed))
        kind_id = gguf.GGMLQuantizationType[kind.upper()]
        assert WEIGHT_FORMATS[kind].width(shape[-1]) == weight.shape[-1]
        writer.add_tensor(name, weight.numpy(), raw_dtype=kind_id)

    def norm(name: str, size: int) -> None:
        g = torch.Generator().manual_seed(next(seed))
        writer.add_tensor(name, (1 + 0.1 * torch.randn(size, generator=g)).numpy())

    matrix("token_embd.weight", VOCAB, hidden)
    norm("output_norm.weight", hidden)
    if not tied:
        matrix("output.weight", VOCAB, hidden)
    width = hidden // heads
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight", hidden)
        norm(f"{block}.ffn_norm.weight", hidden)
        if architecture.startswith("qwen3"):
            norm(f"{block}.attn_q_norm.weight", width)
            norm(f"{block}.attn_k_norm.weight", width)
        matrix(f"{block}.attn_q.weight", heads * width, hidden)
        matrix(f"{block}.attn_k.weight", kv_heads * width, hidden)
        matrix(f"{block}.attn_v.weight", kv_heads * width, hidden)
        matrix(f"{block}.attn_output.weight", hidden, heads * width)
        if experts:
            g = torch.Generator().manual_seed(next(seed))
            router = torch.randn(experts, hidden, generator=g) * hidden**-0.5
            writer.add_tensor(f"{block}.ffn_gate_inp.weight", router.numpy())
        sizes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
        for part, size in sizes.items():
            suffix, leading = ("_exps", (experts,)) if experts else ("", ())
            matrix(f"{block}.ffn_{part}{suffix}.weight", *leading, *size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file

"""The real model in small: a dense Llama as GGUF, and assets that make its parts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoder import smol
from decoder.smol import build
from decoder.smol.difference import MATRICES, write_difference
from decoder.smol.head import write_head
from decoder.smol.recipe import Recipe

E, H, I, LAYERS, DRAFT = 4, 64, 96, 6, 16
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}"
    "<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>{{ '\n' }}"
    "{% endfor %}"
)


def vocabulary() -> tuple[list[str], list[str]]:
    """Special tokens, one per byte, and two merges of spaces."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ", "ĠĠĠĠ"], ["Ġ Ġ", "ĠĠ ĠĠ"]


def tiny_llama() -> LlamaForCausalLM:
    """What is kept as GGUF; bf16 can hold its weights, so that no part loses any of them."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary()[0]),
        hidden_size=H,
        intermediate_size=I,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_((weight + ("norm" in name) * torch.randn_like(weight) / 4).bfloat16())
    return model


def write_gguf(file: Path, model: LlamaForCausalLM, kind: str = "BF16") -> None:
    """As llama.cpp's converter does; ``kind`` is how MLPs and embedding are stored."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(I)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(H // 4)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_tokenizer(writer)
    _add_weights(writer, model, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any) -> None:
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)


def _add_weights(writer: Any, model: LlamaForCausalLM, kind: str) -> None:
    """The pairs of rotary embedding side by side; some weights packed, the norms in fp32."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            weight = weight.view(heads, 2, -1, H).transpose(1, 2).reshape(weight.shape)
        data, stored = weight.numpy(), None
        if "mlp" in name or "embed" in name:
            stored = gguf.GGMLQuantizationType[kind]
            data = gguf.quantize(data, stored)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=stored)


def write_assets(folder: Path) -> None:
    """No difference, random routers and head, a record that says something more."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    factors = {}
    for layer in range(LAYERS):
        factors[f"layers.{layer}.router"] = random(E, H)
        for matrix, neurons in MATRICES.items():
            out, inner = (I, H) if neurons == 0 else (H, I)
            factors[f"layers.{layer}.{matrix}.left"] = torch.zeros(E, out, 2)
            factors[f"layers.{layer}.{matrix}.right"] = random(E, 2, inner)
    write_difference(folder / "difference.safetensors", factors)
    shapes = {"fc": (H, 3 * H), "midlayer.self_attn.o_proj": (H, H)}
    shapes |= {f"midlayer.self_attn.{n}_proj": (H // 2, 2 * H) for n in "kv"}
    shapes |= {f"midlayer.mlp.{n}_proj": (I, H) for n in ("gate", "up")}
    shapes |= {"midlayer.mlp.down_proj": (H, I), "midlayer.self_attn.q_proj": (H, 2 * H)}
    norms = ["norm", *(f"midlayer.{n}" for n in ("hidden_norm", "input_layernorm"))]
    shapes |= dict.fromkeys([*norms, "midlayer.post_attention_layernorm"], (H,))
    state = {f"{name}.weight": random(*shape) for name, shape in shapes.items()}
    state["d2t"] = torch.arange(DRAFT) * 3
    config = {"hidden_size": H, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_head(folder / "eagle.safetensors", state, config)
    (folder / "upcycle.json").write_text('{"tokens": 5}')


def ship_tiny(folder: Path, patch: pytest.MonkeyPatch, kind: str = "BF16") -> Recipe:
    """Have a folder's file and assets, both written here, be what is shipped, built in its cache.

    On a processor that multiplies integers, whichever this one is.

    Args:
        folder: exists; its ``cache`` becomes the project's.
        patch: undoes that.
        kind: as of ``write_gguf``.
    """
    patch.setenv("MOESD_CACHE_DIR", str(folder / "cache"))
    write_gguf(folder / "tiny.gguf", tiny_llama(), kind)
    write_assets(folder / "assets")
    made = tiny_recipe(folder)
    build.record(made)
    patch.setattr(smol, "shipped", lambda: made)
    patch.setattr(smol, "multiplies_integers", lambda: True)
    return made


def tiny_recipe(folder: Path) -> Recipe:
    """What ``tiny.gguf`` and ``assets`` of a folder make."""
    file = folder / "tiny.gguf"
    return Recipe(file, hashlib.sha256(file.read_bytes()).hexdigest(), folder / "assets")

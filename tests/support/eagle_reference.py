"""Random EAGLE heads in every published layout, and their forward pass written out densely.

The reference works on whole sequences with an explicit causal mask, no cache and no chunks, from
the equations of the papers; it shares nothing with ``decoder.drafters`` but the tensor names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

H, HEADS, KV_HEADS, D, INNER = 32, 4, 2, 8, 48
EPS, THETA = 1e-5, 10000.0
LAYER: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "rms_norm_eps": EPS,
    "hidden_act": "silu",
    "rope_theta": THETA,
    "max_position_embeddings": 512,
    "vocab_size": 64,
}


def random_layer(prefix: str, width: int, seed: int) -> dict[str, Tensor]:
    """Attention (inputs ``width`` wide), MLP and the norm between them."""
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 1.5 * columns**-0.5

    return {
        f"{prefix}.self_attn.q_proj.weight": weight(HEADS * D, width),
        f"{prefix}.self_attn.k_proj.weight": weight(KV_HEADS * D, width),
        f"{prefix}.self_attn.v_proj.weight": weight(KV_HEADS * D, width),
        f"{prefix}.self_attn.o_proj.weight": weight(H, HEADS * D),
        f"{prefix}.mlp.gate_proj.weight": weight(INNER, H),
        f"{prefix}.mlp.up_proj.weight": weight(INNER, H),
        f"{prefix}.mlp.down_proj.weight": weight(H, INNER),
        f"{prefix}.post_attention_layernorm.weight": norm(H, seed + 1),
    }


def norm(size: int, seed: int) -> Tensor:
    return 1 + 0.2 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def save(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


def split_files(path: Path, count: int = 2) -> None:
    """Spread a folder's weights over files with an index, as large checkpoints are."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    place = {name: f"model-{1 + i % count}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        save_file({n: t for n, t in tensors.items() if place[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rope(x: Tensor) -> Tensor:
    """``[S, heads, D]``, position = index."""
    rates = THETA ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(x.shape[0], dtype=torch.float64)[:, None, None] * rates
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def attention(x: Tensor, w: dict[str, Tensor], prefix: str) -> Tensor:
    """Causal attention of ``[S, width]``."""
    S = x.shape[0]
    query, key, value = (
        (x @ w[f"{prefix}.self_attn.{n}_proj.weight"].T).view(S, -1, D) for n in "qkv"
    )
    if f"{prefix}.self_attn.q_norm.weight" in w:
        query = rms(query, w[f"{prefix}.self_attn.q_norm.weight"])
        key = rms(key, w[f"{prefix}.self_attn.k_norm.weight"])
    query, key = rope(query), rope(key)
    out = torch.empty(S, HEADS, D, dtype=x.dtype)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = query[:, head] @ key[:, group].T / D**0.5
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf)
        out[:, head] = scores.softmax(-1) @ value[:, group]
    return out.flatten(1) @ w[f"{prefix}.self_attn.o_proj.weight"].T


def mlp(x: Tensor, w: dict[str, Tensor], prefix: str) -> Tensor:
    gate, up, down = (w[f"{prefix}.mlp.{n}_proj.weight"].T for n in ("gate", "up", "down"))
    return (F.silu(x @ gate) * (x @ up)) @ down


def after_attention(x: Tensor, w: dict[str, Tensor], prefix: str) -> Tensor:
    return x + mlp(rms(x, w[f"{prefix}.post_attention_layernorm.weight"]), w, prefix)


def eagle1(w: dict[str, Tensor], embeds: Tensor, features: Tensor, layers: int = 1) -> Tensor:
    """EAGLE-1 under SafeAILab names: ``[S, H]`` outputs for pairs (embeds, features)."""
    x = torch.cat([embeds, features], -1) @ w["fc.weight"].T + w.get("fc.bias", torch.zeros(H))
    for i in range(layers):
        inner = rms(x, w[f"layers.{i}.input_layernorm.weight"]) if i else x
        x = after_attention(x + attention(inner, w, f"layers.{i}"), w, f"layers.{i}")
    return x


def eagle3(
    w: dict[str, Tensor], embeds: Tensor, hidden: Tensor, *, residual_normed: bool = False
) -> Tensor:
    """EAGLE-3's layer under SafeAILab names: fused features ``[S, H]`` to hidden ``[S, H]``."""
    normed = rms(hidden, w["midlayer.hidden_norm.weight"])
    inner = torch.cat([rms(embeds, w["midlayer.input_layernorm.weight"]), normed], -1)
    x = (normed if residual_normed else hidden) + attention(inner, w, "midlayer")
    return after_attention(x, w, "midlayer")


def draft(
    step: Any, read: Any, embedding: Tensor, tokens: list[int], features: Tensor, gamma: int
) -> list[int]:
    """Greedy chain after ``tokens``, recomputing the whole sequence for every drafted token.

    Args:
        step: ``(embeds [S, H], hidden [S, H]) -> [S, H]``.
        read: last hidden ``[H]`` to the drafted target token id.
        embedding: ``[V, H]``.
        tokens: committed tokens, the last one without a feature.
        features: ``[len(tokens) - 1, H]`` fused features.
    """
    tokens, hidden = list(tokens), features
    start = len(tokens)
    for _ in range(gamma):
        out = step(embedding[torch.tensor(tokens[1:])], hidden)
        tokens.append(int(read(out[-1])))
        hidden = torch.cat([hidden, out[-1:]])
    return tokens[start:]

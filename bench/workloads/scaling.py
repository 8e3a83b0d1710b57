"""The paper's architectures scaled to fit a machine, and a random EAGLE head for any target."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from bench.workloads.models import INIT_STD
from decoder.drafters.heads.eagle_config import EagleCheckpoint, EagleConfig
from decoder.perf_model.presets import preset_config

WIDTHS: tuple[str, ...] = ("hidden_size", "intermediate_size", "moe_intermediate_size", "ffn_dim")
WIDTHS += ("shared_expert_intermediate_size", "word_embed_proj_dim", "vocab_size")
MULTIPLE = 64


def scaled_config(name: str, scale: float = 1.0) -> PreTrainedConfig:
    """A preset's architecture with about ``scale`` of its parameters.

    Width and depth shrink by the cube root; the number of experts, the experts per token and the
    ratio of the parts, on which target efficiency depends, stay. Sequences never end by themselves.

    Raises:
        ValueError: ``scale`` is not in (0, 1].
    """
    if not 0.0 < scale <= 1.0:
        raise ValueError(f"scale must be in (0, 1], got {scale}")
    config = preset_config(name)
    fields = config.to_dict() | dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    fields.pop("layer_types", None)  # one entry per layer of the full depth; derived again below
    factor = scale ** (1 / 3)
    if factor < 1.0:
        for name in WIDTHS:
            if fields.get(name):
                fields[name] = _round(fields[name] * factor)
        fields["num_hidden_layers"] = max(2, round(fields["num_hidden_layers"] * factor))
        fields |= _scaled_heads(fields)
    return type(config)(**fields)


def _round(width: float) -> int:
    return max(MULTIPLE, int(width / MULTIPLE + 0.5) * MULTIPLE)


def _scaled_heads(fields: dict[str, Any]) -> dict[str, int]:
    """Heads of 64 that fill the new width, near the old ratio of query to key heads."""
    heads = fields["hidden_size"] // MULTIPLE
    if not fields.get("num_key_value_heads"):
        return {"num_attention_heads": heads}
    groups = fields["num_attention_heads"] // fields["num_key_value_heads"]
    while heads % groups:
        groups -= 1
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": heads // groups,
        "head_dim": MULTIPLE,
    }


def random_eagle(target: Any) -> EagleCheckpoint:
    """An EAGLE-1 head of the target's own width with random weights, run for its cost."""
    config = target.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", heads)
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    inner = config.intermediate_size
    generator = torch.Generator(target.device).manual_seed(2)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        out = torch.empty(rows, columns, dtype=target.dtype, device=target.device)
        return out.normal_(0.0, INIT_STD, generator=generator)

    layer = "layers.0."
    weights = {
        "fc.weight": matrix(hidden, 2 * hidden),
        "fc.bias": torch.zeros(hidden, dtype=target.dtype, device=target.device),
        f"{layer}self_attn.q_proj.weight": matrix(heads * head_dim, hidden),
        f"{layer}self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden),
        f"{layer}self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden),
        f"{layer}self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
        f"{layer}mlp.gate_proj.weight": matrix(inner, hidden),
        f"{layer}mlp.up_proj.weight": matrix(inner, hidden),
        f"{layer}mlp.down_proj.weight": matrix(hidden, inner),
        f"{layer}post_attention_layernorm.weight": torch.ones(
            hidden, dtype=target.dtype, device=target.device
        ),
    }
    head = EagleConfig(
        kind="eagle1",
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_layers=1,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        windows=(0,),
        rope={"rope_theta": 10000.0, "max_position_embeddings": config.max_position_embeddings},
        feature_layers=(-1,),
    )
    return EagleCheckpoint(head, weights, None)

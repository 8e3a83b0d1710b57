"""Families of models in llama.cpp's words: names, sizes, and what goes without saying."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
OUTSIDE = {
    EMBEDDING: "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
Q, K, ROUTER = "self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.gate.weight"
SHARED_GATE = "mlp.shared_expert_gate.weight"  # a vector in a file, a row in transformers
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    Q: "attn_q.weight",
    K: "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    ROUTER: "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    SHARED_GATE: "ffn_gate_inp_shexp.weight",
}
GATE_UP = "mlp.experts.gate_up_proj"
GATE_AND_UP = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "rope.dimension_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_EXPERTS = {"num_experts_per_tok": "expert_used_count", "num_experts": "expert_count"}
_OWN_WIDTH = {"moe_intermediate_size": "expert_feed_forward_length"}
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}


@dataclass(frozen=True, slots=True)
class Family:
    """What llama.cpp calls a family, and what it takes for granted about it.

    Attributes:
        architecture: llama.cpp's name.
        sizes: a configuration's names of what a file's fields hold.
        sparse: whether it has experts, which llama.cpp does not tell by the name.
        rotary_pairs: whether the two rows that the rotary embedding turns together lie side by
            side in a query or key projection; else half a head apart, as transformers has them.
        wanted: configuration that llama.cpp does not read from a file.
    """

    architecture: str
    sizes: dict[str, str] = field(default_factory=lambda: _SIZES)
    sparse: bool = False
    rotary_pairs: bool = False
    wanted: dict[str, Any] = field(default_factory=dict)


# By transformers' ``model_type``.
FAMILIES = {
    "llama": Family(
        "llama",
        rotary_pairs=True,
        wanted={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
    ),
    "mixtral": Family(
        "llama",
        _SIZES | {"num_experts_per_tok": "expert_used_count", "num_local_experts": "expert_count"},
        sparse=True,
        rotary_pairs=True,
        wanted={"sliding_window": None, "hidden_act": "silu"},
    ),
    "qwen2": Family("qwen2", wanted={"use_sliding_window": False, "hidden_act": "silu"}),
    "qwen3": Family(
        "qwen3",
        wanted={"use_sliding_window": False, "attention_bias": False, "hidden_act": "silu"},
    ),
    "qwen2_moe": Family(
        "qwen2moe",
        _SIZES
        | _EXPERTS
        | _OWN_WIDTH
        | {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        sparse=True,
        wanted=_EVERY_LAYER
        | {"norm_topk_prob": False, "use_sliding_window": False, "hidden_act": "silu"},
    ),
    "qwen3_moe": Family(
        "qwen3moe",
        _SIZES | _EXPERTS | _OWN_WIDTH,
        sparse=True,
        wanted=_EVERY_LAYER
        | {
            "norm_topk_prob": True,
            "sliding_window": None,
            "attention_bias": False,
            "hidden_act": "silu",
        },
    ),
}

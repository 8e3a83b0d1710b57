"""Our models' two families in llama.cpp's words: names, sizes, and what goes without saying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HEAD = "lm_head.weight"
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
Q, K, ROUTER = "self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.gate.weight"
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    Q: "attn_q.weight",
    K: "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    ROUTER: "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
GATE_UP = "mlp.experts.gate_up_proj"
GATE_AND_UP = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_experts_per_tok": "expert_used_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "rope.dimension_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


@dataclass(frozen=True, slots=True)
class Family:
    """What llama.cpp calls a family, and what it takes for granted about it.

    Attributes:
        architecture: llama.cpp's name.
        sizes: a configuration's names of what a file's fields hold.
        rotary_pairs: whether the two rows that the rotary embedding turns together lie side by
            side in a query or key projection; else half a head apart, as transformers has them.
        wanted: configuration that llama.cpp does not read from a file.
    """

    architecture: str
    sizes: dict[str, str]
    rotary_pairs: bool
    wanted: dict[str, Any]


FAMILIES = {
    "mixtral": Family(
        "llama",
        _SIZES | {"num_local_experts": "expert_count"},
        True,
        {"sliding_window": None, "hidden_act": "silu"},
    ),
    "qwen3_moe": Family(
        "qwen3moe",
        _SIZES
        | {
            "num_experts": "expert_count",
            "moe_intermediate_size": "expert_feed_forward_length",
        },
        False,
        {
            "norm_topk_prob": True,
            "sliding_window": None,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": False,
            "hidden_act": "silu",
        },
    ),
}

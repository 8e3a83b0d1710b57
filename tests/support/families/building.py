"""Every causal LM class of the installed transformers, tiny.

The classes are found, not listed: what transformers maps to causal language modelling, and what
generates text in a modelling file with the experts interface. A config is the class's default with
small numbers in the fields whose names say what they size; ``_OVERRIDES`` holds what that misses.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from support.tiny import randomize
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, CONTEXT, WINDOW = 97, 256, 6
FIRST_ORDINARY = 3  # smaller ids are special: padding, beginning, end

_FIELDS: dict[Any, str] = {
    VOCAB: "vocab_size text_vocab_size vocab_size_per_layer_input",
    CONTEXT: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length "
    "max_target_positions max_source_positions model_max_length",
    32: "hidden_size n_embd d_model decoder_hidden_size word_embed_proj_dim embedding_size "
    "embedding_dim emb_dim lru_width out_hidden_size "
    "moe_hidden_size projector_hidden_size",
    48: "intermediate_size intermediate_size_mlp ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "ffn_dim n_inner dff dim_ff projection_intermediate_size",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size q_lora_rank "
    "kv_lora_rank o_lora_rank hidden_size_per_layer_input index_head_dim mamba_n_heads",
    8: "head_dim dim_head qk_nope_head_dim qk_rope_head_dim v_head_dim num_experts "
    "num_local_experts n_routed_experts moe_num_experts laurel_rank chunk_size mamba_chunk_size",
    WINDOW: "sliding_window attention_window attention_window_size window_size "
    "attention_chunk_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads rotary_dim mamba_dt_rank time_step_rank mamba_d_head mamba_d_state "
    "linear_key_head_dim linear_value_head_dim linear_head_dim index_n_heads linear_num_heads "
    "linear_num_key_heads linear_num_value_heads ssm_state_size",
    2: "num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk",
    1: "n_group topk_group num_expert_group num_codebooks",
}
_SIZES = {field: size for size, fields in _FIELDS.items() for field in fields.split()}
_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_DERIVED = {"head_dim", "num_experts_per_tok", "num_key_value_heads"}  # None is no size of theirs
_DEPTHS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
           "encoder_layers", "num_blocks"}  # fmt: skip
_LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {**_ROPE, "mrope_section": [1, 1, 2]}

_OVERRIDES: dict[str, dict[str, Any]] = {  # by model_type, wherever a config nests
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE}
    },
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
    },
    "deepseek_v4": {
        "o_groups": 2,
        "index_topk": 2,
        "num_nextn_predict_layers": 0,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"head_dim": 16},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16], "rope_parameters": _MROPE},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling2_vision": {"text_hidden_size": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mistral4": {"head_dim": 16},
    "mllama_text_model": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16] * 4},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 97,
        "split_ngram_parts": 2,
        "hc_lowrank": 4,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 200},  # of the whole model's config
    "recurrent_gemma": {"num_hidden_layers": 3},  # two recurrent layers, then one of attention
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 11,
        "shape_embed_dim": 8,
        "shape_vocab_size": 11,
    },
    "xlstm": {
        "hidden_size": 64,
        "embedding_dim": 64,
        "ffn_round_up_to_multiple_of": 8,
        "qk_dim_factor": 1.0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}

NOT_BUILT: dict[str, str] = {
    "BltForCausalLM": "reads bytes in patches that five nested models agree on",
    "DeepseekOcr2ForConditionalGeneration": "its forward needs an image",
    "Gemma3nForConditionalGeneration": "its vision tower is the timm package's",
    "Gemma4AssistantForCausalLM": "drafts over its target's cache, from its target's states",
    "Gemma4UnifiedAssistantForCausalLM": "drafts over its target's cache, from its target's states",
    "Qwen3OmniMoeForConditionalGeneration": "a container of a thinker and a talker",
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration": "reads states, not token ids",
    "Qwen3OmniMoeTalkerForConditionalGeneration": "reads states, not token ids",
}


def _found() -> dict[str, str]:
    """Module of each class, by its name."""
    mapped: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        mapped.update([names] if isinstance(names, str) else names)
    modules = {}
    for path in Path(transformers.models.__file__).parent.glob("*/modeling_*.py"):
        source = path.read_text()
        has_experts = "use_experts_implementation" in source or "ALL_EXPERTS_FUNCTIONS" in source
        for name in re.findall(r"^class (\w+)\(", source, re.MULTILINE):
            generates = name.endswith(("ForCausalLM", "ForConditionalGeneration"))
            if name in mapped or (has_experts and generates and "PreTrainedModel" not in name):
                modules[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return dict(sorted(modules.items()))


CLASSES = _found()
FAMILY_NAMES = [name for name in CLASSES if name not in NOT_BUILT]


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a class in ``FAMILY_NAMES``, in evaluation mode, the same each time.

    ``changes`` to its config.
    """
    kind = getattr(importlib.import_module(CLASSES[name]), name)
    config = kind.config_class(**_shrunk(kind.config_class().to_dict()) | changes)
    config.is_decoder = True  # of the BERT kind, which attends both ways otherwise
    torch.manual_seed(0)
    model = kind(config)
    randomize(model, 0)
    return model.to(dtype).eval()


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a config class, from what its default says."""
    small: dict[str, Any] = {"per_layer_config": {}} if "per_layer_config" in config else {}
    kinds = {field: list(dict.fromkeys(config.get(field) or ())) for field in _LAYER_KINDS}
    depth = max(2, *map(len, kinds.values()))  # one layer of each kind
    for field, value in config.items():
        if isinstance(value, dict) and field.endswith("_config") and field != "per_layer_config":
            small[field] = _shrunk(value)
        elif field in _DEPTHS:
            small[field] = depth
        elif kinds.get(field):
            small[field] = (kinds[field] * depth)[:depth]
        elif field in _SIZES and (value is not None or field in _DERIVED):
            small[field] = _SIZES[field]
    if "kv_lora_rank" in config and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small | _OVERRIDES.get(config.get("model_type", ""), {})

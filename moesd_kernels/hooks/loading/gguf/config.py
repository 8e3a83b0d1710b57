"""A GGUF file's metadata as transformers' configuration of its model."""

from __future__ import annotations

import math
from typing import Any

from .families import EMBEDDING, FAMILIES, HEAD, OUTSIDE, Family
from .file import GgufFile

_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
# Of the families that are read; all that llama.cpp takes for an end (llama-vocab.cpp).
_ENDS = {
    *("</s>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"),
}
_LARGEST = {"max_position_embeddings": 2**31 - 1}
_LARGEST_SIZE = 2**19  # of any other: with three of them a tensor's bytes stay below 2**63
_LEAST_TENSORS = 9  # of a layer


def config_of(source: GgufFile) -> tuple[Any, Family]:
    """The configuration, and llama.cpp's words for it.

    Raises:
        ValueError: metadata that is missing, of another kind, or of no model that is read.
    """
    from transformers import AutoConfig

    architecture = source.field("general.architecture", str)
    sparse = source.field(f"{architecture}.expert_count", int, 0) > 0
    fitting = {
        kind: family
        for kind, family in FAMILIES.items()
        if (family.architecture, family.sparse) == (architecture, sparse)
    }
    if not fitting:
        known = dict.fromkeys(family.architecture for family in FAMILIES.values())
        with_experts = " with experts" if sparse and architecture in known else ""
        raise ValueError(
            f"{source.path}: the architectures that are read are {', '.join(known)}, "
            f"got {architecture!r}{with_experts}"
        )
    ((kind, family),) = fitting.items()
    for name in (OUTSIDE[EMBEDDING], OUTSIDE["model.norm.weight"]):
        if name not in source.tensors:
            raise ValueError(f"{source.path} has no {name}")
    sizes = {name: _size(source, architecture, name, key) for name, key in family.sizes.items()}
    _require_sane(source, sizes)
    _require_plain_rotation(source, architecture, sizes["head_dim"])
    theta = source.field(f"{architecture}.rope.freq_base", float, 1e4)
    if not 0 < theta < math.inf:
        raise ValueError(f"{source.path}: rope.freq_base must be positive, got {theta}")
    fields = {
        **sizes,
        **family.wanted,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": OUTSIDE[HEAD] not in source.tensors,
        **{name: _token(source, key) for name, key in _TOKENS.items()},
    }
    return AutoConfig.for_model(kind, **fields), family


def end_tokens(source: GgufFile) -> int | list[int] | None:
    """What ends a text: its end, that of a turn or a message, and tokens that mean it by name.

    Files name one or two of a chat's ends, and llama.cpp knows the others by their text.
    """
    given = [_token(source, key) for key in ("eos", "eot", "eom")]
    tokens = source.field("tokenizer.ggml.tokens", list, [])
    named = [index for index, token in enumerate(tokens) if token in _ENDS]
    ends = list(dict.fromkeys(token for token in [*given, *named] if token is not None))
    return ends[0] if len(ends) == 1 else ends or None


def _token(source: GgufFile, name: str) -> int | None:
    """The id of a token with a role, unless it is beyond the vocabulary, as in llama.cpp."""
    key = f"tokenizer.ggml.{name}_token_id"
    token: int = source.field(key, int, -1)
    return token if 0 <= token < source.tensors[OUTSIDE[EMBEDDING]].shape[0] else None


def _size(source: GgufFile, architecture: str, name: str, key: str) -> int | float:
    """A size of the model's, by transformers' name and llama.cpp's."""
    key = f"{architecture}.{key}"
    default: int | None = None
    if name == "rms_norm_eps":
        eps = float(source.field(key, float))
        if not 0 <= eps < math.inf:
            raise ValueError(f"{source.path}: {key} must be a small number, got {eps}")
        return eps
    if name == "vocab_size":
        default = source.tensors[OUTSIDE[EMBEDDING]].shape[0]
    elif name == "num_key_value_heads":
        default = source.fields.get(f"{architecture}.attention.head_count")
    elif name == "head_dim":
        key = f"{architecture}.attention.key_length"
        default = source.fields.get(f"{architecture}.rope.dimension_count") or _shared_out(
            source, architecture
        )
    size: int = source.field(key, int, default)
    largest = _LARGEST.get(name, _LARGEST_SIZE)
    if not 0 < size <= largest:
        raise ValueError(f"{source.path}: {key} must be in [1, {largest}], got {size}")
    return size


def _shared_out(source: GgufFile, architecture: str) -> int:
    """The hidden size, over the heads."""
    hidden = source.field(f"{architecture}.embedding_length", int)
    return int(hidden // max(1, source.field(f"{architecture}.attention.head_count", int)))


def _require_sane(source: GgufFile, sizes: dict[str, Any]) -> None:
    """Refuse sizes that fit no model, before one is made of them."""
    layers = sizes["num_hidden_layers"]
    if layers * _LEAST_TENSORS > len(source.tensors):
        raise ValueError(
            f"{source.path} has {len(source.tensors)} tensors, too few for {layers} layers"
        )
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(
            f"{source.path}: attention.head_count must be a multiple of head_count_kv, "
            f"got {heads} and {kv_heads}"
        )
    if sizes["head_dim"] % 2:
        raise ValueError(f"{source.path}: heads must have an even size, got {sizes['head_dim']}")
    experts = sizes.get("num_experts", sizes.get("num_local_experts"))
    if experts is not None and sizes["num_experts_per_tok"] > experts:
        raise ValueError(
            f"{source.path}: expert_used_count must be in [1, {experts}], "
            f"got {sizes['num_experts_per_tok']}"
        )


def _require_plain_rotation(source: GgufFile, architecture: str, head: int | float) -> None:
    factors = (f"{architecture}.rope.scaling.factor", f"{architecture}.rope.scale_linear")
    factor = next((source.field(key, float) for key in factors if key in source.fields), 0.0)
    # As llama.cpp reads it: linear where no type is given, and 0 is no factor.
    implied = "none" if factor in (0, 1) else "linear"
    scaling = source.field(f"{architecture}.rope.scaling.type", str, implied)
    if scaling != "none":
        raise ValueError(
            f"{source.path}: rotary embeddings must not be scaled, got the scaling {scaling!r}"
        )
    grown = source.field(f"{architecture}.rope.scaling.attn_factor", float, 1.0)
    if grown != 1:  # on the cosines, whatever the type
        raise ValueError(
            f"{source.path}: rotary embeddings must not be scaled, got the factor {grown}"
        )
    turned = source.field(f"{architecture}.rope.dimension_count", int, head)
    if turned != head:
        raise ValueError(
            f"{source.path}: rotary embeddings must turn whole heads of {head}, got {turned}"
        )

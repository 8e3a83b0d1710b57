"""A GGUF file's metadata as transformers' configuration of its model."""

from __future__ import annotations

from typing import Any

from .families import EMBEDDING, FAMILIES, HEAD, OUTSIDE, Family
from .file import GgufFile

_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_LARGEST = 2**31 - 1


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
    if sizes["num_hidden_layers"] > len(source.tensors):  # before as many are made
        raise ValueError(
            f"{source.path} has {len(source.tensors)} tensors, too few for "
            f"{sizes['num_hidden_layers']} layers"
        )
    _require_plain_rotation(source, architecture, sizes["head_dim"])
    theta = source.field(f"{architecture}.rope.freq_base", float, 1e4)
    fields = {
        **sizes,
        **family.wanted,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": OUTSIDE[HEAD] not in source.tensors,
        **{name: _token(source, key) for name, key in _TOKENS.items()},
    }
    return AutoConfig.for_model(kind, **fields), family


def end_tokens(source: GgufFile) -> int | list[int] | None:
    """What ends a text: the end of one, and of a turn where a chat has another."""
    given = [_token(source, key) for key in ("eos", "eot")]
    ends = list(dict.fromkeys(token for token in given if token is not None))
    return ends[0] if len(ends) == 1 else ends or None


def _token(source: GgufFile, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    return source.field(key, int) if key in source.fields else None


def _size(source: GgufFile, architecture: str, name: str, key: str) -> int | float:
    """A size of the model's, by transformers' name and llama.cpp's."""
    key = f"{architecture}.{key}"
    default: int | None = None
    if name == "rms_norm_eps":
        return float(source.field(key, float))
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
    if not 0 < size <= _LARGEST:
        raise ValueError(f"{source.path}: {key} must be in [1, {_LARGEST}], got {size}")
    return size


def _shared_out(source: GgufFile, architecture: str) -> int:
    """The hidden size, over the heads."""
    hidden = source.field(f"{architecture}.embedding_length", int)
    return int(hidden // max(1, source.field(f"{architecture}.attention.head_count", int)))


def _require_plain_rotation(source: GgufFile, architecture: str, head: int | float) -> None:
    scaling = source.field(f"{architecture}.rope.scaling.type", str, "none")
    if scaling != "none":
        raise ValueError(
            f"{source.path}: rotary embeddings must not be scaled, got the scaling {scaling!r}"
        )
    turned = source.field(f"{architecture}.rope.dimension_count", int, head)
    if turned != head:
        raise ValueError(
            f"{source.path}: rotary embeddings must turn whole heads of {head}, got {turned}"
        )

"""What a model's ``generation_config.json`` asks for, in fields of ``SamplingParams``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# Fields of a generation config that change nothing in what is returned, and why.
WITHOUT_EFFECT = {
    "early_stopping": "read by beam search alone",
    "length_penalty": "read by beam search alone",
    "decoder_start_token_id": "read for encoder-decoder models alone",
    "use_cache": "speed only; speculation keeps a cache of its own",
    "cache_config": "read with cache_implementation alone",
    "max_cache_len": "read with cache_implementation alone",
    "prefill_chunk_size": "memory only",
    "compile_config": "speed only",
    "disable_compile": "speed only",
    "low_memory": "read by contrastive search alone",
    "num_assistant_tokens": "read with an assistant alone",
    "num_assistant_tokens_schedule": "read with an assistant alone",
    "assistant_confidence_threshold": "read with an assistant alone",
    "max_matching_ngram_size": "read with an assistant alone",
    "assistant_lookbehind": "read with an assistant alone",
    "target_lookbehind": "read with an assistant alone",
    "continuous_batching_config": "read by generate_batch alone",
    "transformers_version": "a note",
}
# And those that say what is done in other places, or how `generate` returns it.
_ELSEWHERE = frozenset({
    "do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "cache_implementation",
    "return_dict_in_generate",
})  # fmt: skip
# Field of the config: that of ``SamplingParams``.
_TAKEN = {
    name: name
    for name in (
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens",
        "max_new_tokens",
    )
} | {"stop_strings": "stop"}  # fmt: skip


class ModelDefaults(NamedTuple):
    """A generation config, read.

    Attributes:
        taken: fields of ``SamplingParams`` that it gives a value, unchecked.
        left_out: what else it asks for and is not done.
    """

    taken: dict[str, Any]
    left_out: dict[str, Any]


def model_defaults(config: Mapping[str, Any]) -> ModelDefaults:
    """Read a generation config as transformers does: without ``do_sample`` decoding is greedy.

    What the config does not say stays as ``SamplingParams`` has it; transformers would add a top-k
    of 50 where it samples.

    Args:
        config: the fields of ``generation_config.json``.
    """
    said = {name: value for name, value in config.items() if value is not None}
    if said.get("do_sample") is True:
        said.setdefault("temperature", 1.0)
    else:
        said.pop("temperature", None)
    taken = {field: said[name] for name, field in _TAKEN.items() if name in said}
    known = {*_TAKEN, *_ELSEWHERE, *WITHOUT_EFFECT}
    rest = {k: v for k, v in said.items() if k not in known and k[:1] != "_" and v is not False}
    return ModelDefaults(taken, _without_neutral(rest) if rest else rest)


def generation_fields(model: Any) -> dict[str, Any]:
    """What the generation config of a loaded transformers model says."""
    config = getattr(model, "generation_config", None)
    return {} if config is None else config.to_diff_dict()


def _without_neutral(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not at the value which does nothing."""
    from transformers import GenerationConfig

    neutral = GenerationConfig()._get_default_generation_params()
    return {k: v for k, v in fields.items() if k not in neutral or v != neutral[k]}

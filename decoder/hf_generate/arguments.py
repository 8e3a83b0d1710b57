"""What ``generate`` was asked for: every argument is honoured, without effect, or refused by name.

Fields and keywords of a later transformers that are not known here are refused when they are set.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from decoder.errors import UserError
from decoder.requests.defaults import WITHOUT_EFFECT

# Fields of the generation config that reach the decoder: as lengths, as the logits processors and
# stopping criteria that `generate` makes of them, or as rows that it has repeated.
HONOURED = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens",
    "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "renormalize_logits", "guidance_scale",
    "watermarking_config", "num_return_sequences", "return_dict_in_generate", "token_healing",
    "pad_token_id", "bos_token_id", "eos_token_id",
})  # fmt: skip

# Fields that ask for another way of decoding or for what speculation does not compute, with the
# values besides None and False that do not.
_REFUSED: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "use_mtp": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "assistant_ensemble_weight": None,
    "speculation_type": None,
    "is_assistant": None,
    "cache_implementation": "dynamic",
    "output_scores": None,
    "output_logits": None,
    "output_attentions": None,
    "output_hidden_states": None,
}

# Keywords of `generate` itself that are honoured, or looked at by it and by processors alone.
_KEYWORDS = frozenset({
    "self", "inputs", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "streamer", "negative_prompt_ids",
    "negative_prompt_attention_mask", "custom_generate", "use_model_defaults", "kwargs",
})  # fmt: skip

# What else `generate` hands on for the model's forward, and is looked at here.
_INPUTS = frozenset({
    "attention_mask", "position_ids", "past_key_values", "cache_params", "use_cache",
    "logits_to_keep",
})  # fmt: skip

_GENERATE: Callable[..., Any] = inspect.unwrap(GenerationMixin.generate)


def keywords() -> dict[str, Any]:
    """What the ``generate`` that is running was called with, by the names of its own parameters.

    It hands a custom method neither ``streamer`` nor ``assistant_model``: they can only be seen
    where it stands. Empty when no ``generate`` is running.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _GENERATE.__code__:
        frame = frame.f_back
    if frame is None:
        return {}
    return {name: frame.f_locals.get(name) for name in inspect.signature(_GENERATE).parameters}


def check(config: GenerationConfig, given: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Refuse what is neither honoured nor without effect.

    Args:
        config: as ``generate`` hands it over, defaults filled in.
        given: from ``keywords``.
        inputs: what else it hands over.

    Raises:
        UserError: naming the first such argument.
    """
    defaults = config._get_default_generation_params()
    for name in vars(GenerationConfig()):
        if name.startswith("_") or name in HONOURED or name in WITHOUT_EFFECT:
            continue
        neutral = _REFUSED.get(name, defaults.get(name))
        _refuse_unless_neutral(name, getattr(config, name, None), neutral)
    for name, value in given.items():
        if name not in _KEYWORDS:
            _refuse_unless_neutral(name, value)
    for name, value in inputs.items():
        if name not in _INPUTS and value != {}:  # nothing encoded for a model of several modalities
            _refuse_unless_neutral(name, value)
    for name in ("past_key_values", "cache_params"):
        cache = inputs.get(name)
        # One that `generate` made itself is new, and nobody will look at it again.
        if getattr(cache, "_is_user_defined", False):
            raise _refusal(name, type(cache).__name__)
    if not isinstance(kept := inputs.get("logits_to_keep", 1), int):
        raise _refusal("logits_to_keep", f"a {type(kept).__name__}")


def _refuse_unless_neutral(name: str, value: Any, neutral: Any = None) -> None:
    if value is None or value is False:
        return
    plain = isinstance(value, (bool, int, float, str))
    if not plain or value != neutral:
        raise _refusal(name, repr(value) if plain else f"a {type(value).__name__}")


def _refusal(name: str, value: str) -> UserError:
    return UserError(f"{name} is not supported with speculative generation, got {value}")


def prompts(input_ids: Tensor, inputs: Mapping[str, Any]) -> list[list[int]]:
    """Rows without their left padding.

    Args:
        input_ids: ``[B, L]`` integers.
        inputs: ``attention_mask`` ``[B, L]`` and ``position_ids``, each may be missing.

    Raises:
        UserError: padding elsewhere, or positions other than those of the tokens in their row.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(input_ids)
    if mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}, "
            f"got {list(mask.shape)}"
        )
    kept = mask.to(input_ids.device) != 0
    if bool((kept[:, 1:] < kept[:, :-1]).any()) or not bool(kept[:, -1:].all()):
        raise UserError(
            "attention_mask, by default 0 where a prompt has pad_token_id, must be zeros and then "
            "ones in every row, got zeros after a one or no ones: pad prompts on the left"
        )
    positions = inputs.get("position_ids")
    if positions is not None:
        expected = kept.cumsum(dim=-1) - 1
        if positions.shape[-1] != input_ids.shape[1] or bool(
            ((positions.to(input_ids.device) != expected) & kept).any()
        ):
            raise UserError(
                "position_ids must count the tokens of each row from 0 with speculative "
                "generation, got others"
            )
    pairs = zip(input_ids.tolist(), kept.sum(dim=1).tolist(), strict=True)
    return [row[len(row) - count :] for row, count in pairs]

"""Every field of transformers' generation config and every keyword of ``generate``, one by one."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.generation import END, batch, draft, method, outcome, target
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from decoder.errors import UserError
from decoder.hf_generate import arguments

torch.set_num_threads(1)
FAMILY = "mixtral"
BASE = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
ONE = {"do_sample": True, "top_k": 1}  # sampling from one token: as definite as greedy decoding


class Ids(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def sampled(**changes: Any) -> dict[str, Any]:
    return {"do_sample": True, "top_k": 0, **changes}


# A value for each field that is not its neutral one, with what makes it matter.
FIELDS: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 16, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 4},
    "min_length": {"min_length": 20, "eos_token_id": [END, 9, 30, 31, 32]},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [END, 9, 30, 31, 32]},
    "early_stopping": {"early_stopping": True},
    "max_time": {"max_time": 1e-9},
    "stop_strings": {"stop_strings": ["a"]},
    "do_sample": ONE,
    "num_beams": {"num_beams": 2},
    "use_mtp": {"use_mtp": True},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "cache_config": {"cache_config": {"backend": "quanto"}},
    "max_cache_len": {"max_cache_len": 64},
    "temperature": sampled(temperature=1e-4),
    "top_k": ONE,
    "top_p": sampled(top_p=1e-6),
    "min_p": sampled(min_p=1.0),
    "top_h": ONE | {"top_h": 0.4},
    "typical_p": sampled(typical_p=1e-6),
    "epsilon_cutoff": sampled(epsilon_cutoff=0.999),
    "eta_cutoff": ONE | {"eta_cutoff": 0.5},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "length_penalty": {"length_penalty": 2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(0, 97, 2)] + [[7, 9]]},
    "renormalize_logits": {"renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": (2, 3.0), "eos_token_id": END
    },
    "suppress_tokens": {"suppress_tokens": list(range(0, 97, 2))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 97, 2))},
    "sequence_bias": {"sequence_bias": {(11,): 50.0}},
    "token_healing": {"token_healing": True},
    "guidance_scale": {"guidance_scale": 1.5},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=50.0)},
    "num_return_sequences": ONE | {"num_return_sequences": 2},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "pad_token_id": {"pad_token_id": 3, "eos_token_id": [9, 30, 31, 32]},
    "bos_token_id": {"bos_token_id": 3},
    "eos_token_id": {"eos_token_id": [9, 30, 31, 32]},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "decoder_start_token_id": {"decoder_start_token_id": 3},
    "is_assistant": {"is_assistant": True},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "constant"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.9},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "max_matching_ngram_size": {"max_matching_ngram_size": 3},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "assistant_lookbehind": {"assistant_lookbehind": 3},
    "target_lookbehind": {"target_lookbehind": 3},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5},
    "speculation_type": {"speculation_type": "dflash"},
    "compile_config": {"compile_config": {"mode": "default"}},
    "disable_compile": {"disable_compile": True},
    "continuous_batching_config": {"continuous_batching_config": {"page_size": 4}},
    "low_memory": {"low_memory": True},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "high"},
    "diversity_penalty": {"diversity_penalty": 0.5},
    "num_beam_groups": {"num_beam_groups": 2},
    "constraints": {"constraints": [object()]},
    "force_words_ids": {"force_words_ids": [[3]]},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    "transformers_version": {"transformers_version": "1"},
}  # fmt: skip

# The same for what else `generate` takes. Each is made when it is needed: some keep state.
KEYWORDS: dict[str, Any] = {
    "inputs": lambda: {"inputs": batch(2)["input_ids"], "input_ids": None, "attention_mask": None},
    "generation_config": lambda: {"generation_config": GenerationConfig(suppress_tokens=[9, 30])},
    "logits_processor": lambda: {
        "logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)])
    },
    "stopping_criteria": lambda: {
        "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(15)])
    },
    "prefix_allowed_tokens_fn": lambda: {
        "prefix_allowed_tokens_fn": lambda row, ids: [6 + row, 9 + len(ids)]
    },
    "synced_gpus": lambda: {"synced_gpus": True},
    "assistant_model": lambda: {"assistant_model": draft(FAMILY)},
    "streamer": lambda: {"streamer": Ids()},
    "negative_prompt_ids": lambda: {"negative_prompt_ids": torch.tensor([[6]])},
    "negative_prompt_attention_mask": lambda: {
        "negative_prompt_attention_mask": torch.tensor([[1]])
    },
    "use_model_defaults": lambda: {"use_model_defaults": False},
    # Not in the signature: popped from the others, or for the model.
    "tokenizer": lambda: {"tokenizer": object()},
    "assistant_tokenizer": lambda: {"assistant_tokenizer": object()},
    "trust_remote_code": lambda: {"trust_remote_code": False},
    "past_key_values": lambda: {"past_key_values": DynamicCache()},
    "position_ids": lambda: {"position_ids": torch.arange(7, 7 + width())[None].repeat(3, 1)},
    "inputs_embeds": lambda: {"inputs_embeds": torch.zeros(3, width(), 32).double()},
    "token_type_ids": lambda: {"token_type_ids": torch.zeros(3, width()).long()},
    "output_router_logits": lambda: {"output_router_logits": True},
    "labels": lambda: {"labels": batch()["input_ids"]},
    "logits_to_keep": lambda: {"logits_to_keep": torch.tensor([0])},
    "unheard_of": lambda: {"unheard_of": 3},
}


def width() -> int:
    return batch()["input_ids"].shape[1]


def ours_and_theirs(changes: Any) -> tuple[Any, Any]:
    results = []
    for custom in (None, method(FAMILY, "ngram")):
        made = changes() if callable(changes) else changes
        asked = {**batch(), **BASE, **made, "custom_generate": custom}
        asked = {name: value for name, value in asked.items() if value is not None}
        results.append(outcome(target(FAMILY), asked))
    return results[1], results[0]


def check(name: str, ours: Any, theirs: Any) -> None:
    """Equal, refused by name, or impossible for transformers as well."""
    if isinstance(ours, UserError):
        assert name in str(ours)
    elif isinstance(ours, Exception):
        assert isinstance(theirs, Exception) or name in {"stop_strings", "token_healing"}, ours
    else:
        assert isinstance(theirs, torch.Tensor), f"expected {theirs!r}, got {ours}"
        assert torch.equal(ours, theirs)


def public_fields() -> set[str]:
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")}


def test_every_field_of_the_installed_transformers_is_tried() -> None:
    assert public_fields() <= set(FIELDS)
    keywords = set(inspect.signature(inspect.unwrap(GenerationMixin.generate)).parameters)
    assert keywords <= set(KEYWORDS) | {"self", "kwargs", "custom_generate"}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", sorted(FIELDS))
def test_no_field_is_ignored(name: str) -> None:
    if name not in public_fields():
        pytest.skip("a later transformers has it")
    check(name, *ours_and_theirs(FIELDS[name]))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", sorted(KEYWORDS))
def test_no_keyword_is_ignored(name: str) -> None:
    check(name, *ours_and_theirs(KEYWORDS[name]))


# Fields whose value above cannot show in the sequences of this batch.
_UNSEEN = {
    "do_sample", "top_k", "top_p", "min_p", "temperature", "epsilon_cutoff", "eta_cutoff", "top_h",
    "renormalize_logits", "remove_invalid_values", "forced_bos_token_id", "bos_token_id",
    "return_dict_in_generate", "stop_strings", "token_healing", "guidance_scale",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(arguments.HONOURED - _UNSEEN))
def test_what_is_honoured_shows(name: str) -> None:
    """The values above do change what transformers returns, so that being equal means something."""
    plain = outcome(target(FAMILY), {**batch(), **BASE})
    theirs = outcome(target(FAMILY), {**batch(), **BASE, **FIELDS[name]})
    assert isinstance(plain, torch.Tensor) and isinstance(theirs, torch.Tensor)
    assert plain.shape != theirs.shape or not torch.equal(plain, theirs)


def test_a_field_and_a_keyword_of_tomorrow_are_refused() -> None:
    config = GenerationConfig()
    original = GenerationConfig.__init__

    def later(self: Any, **kwargs: Any) -> None:
        original(self, **kwargs)
        self.dream_depth = kwargs.get("dream_depth")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationConfig, "__init__", later)
        config.dream_depth = None  # type: ignore[attr-defined]
        arguments.check(config, {}, {})
        config.dream_depth = 3  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"dream_depth is not supported .* got 3"):
            arguments.check(config, {}, {})
    with pytest.raises(UserError, match="dream_model is not supported"):
        arguments.check(GenerationConfig(), {"dream_model": object()}, {})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0, 0], [1, 1, 1, 1]], "pad prompts on the left"),
        ([[1, 0, 1, 1], [1, 1, 1, 1]], "pad prompts on the left"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "pad prompts on the left"),
        ([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], "must have the shape of input_ids"),
    ],
)
def test_masks_that_are_no_left_padding_are_refused(mask: list[list[int]], message: str) -> None:
    ids = torch.arange(6, 14).view(2, 4)
    with pytest.raises(UserError, match=message):
        target(FAMILY).generate(
            ids, attention_mask=torch.tensor(mask), custom_generate=method(FAMILY, "ngram")
        )


def test_a_mask_of_more_dimensions_is_refused_by_transformers() -> None:
    ids = torch.arange(6, 14).view(2, 4)
    with pytest.raises(ValueError, match="must be 2D"):
        target(FAMILY).generate(
            ids,
            attention_mask=torch.ones(2, 1, 4, 4),
            custom_generate=method(FAMILY, "ngram"),
        )

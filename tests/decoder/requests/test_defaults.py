"""A model's generation config: what is taken from it, what is left out, and that it is said."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from decoder import SamplingParams
from decoder.requests.defaults import model_defaults

QWEN = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
}
TAKEN = {key: value for key, value in QWEN.items() if key != "do_sample"}


@pytest.mark.parametrize(
    ("config", "taken", "left_out"),
    [
        ({}, {}, {}),
        ({**QWEN, "eos_token_id": [2, 3], "pad_token_id": 2}, TAKEN, {}),
        ({"do_sample": True}, {"temperature": 1.0}, {}),
        ({"do_sample": True, "temperature": None}, {"temperature": 1.0}, {}),
        # Greedy, as transformers has it; where a prompt of its own is sampled, the rest counts.
        ({"temperature": 0.6, "top_p": 0.9}, {"top_p": 0.9}, {}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1},
         {"repetition_penalty": 1.1}, {}),
        ({"max_new_tokens": 64, "min_new_tokens": 2, "stop_strings": ["a"]},
         {"max_new_tokens": 64, "min_new_tokens": 2, "stop": ["a"]}, {}),
        # Neutral, of no effect, or a note.
        ({"num_beams": 1, "length_penalty": 2.0, "use_cache": True, "output_scores": False,
          "transformers_version": "4.40", "_from_model_config": True, "max_length": 20,
          "cache_implementation": "hybrid"}, {}, {}),
        ({"num_beams": 4, "max_length": 4096, "penalty_alpha": 0.6, "chat_format": "chatml",
          "no_repeat_ngram_size": 3, "suppress_tokens": [1]}, {},
         {"num_beams": 4, "max_length": 4096, "penalty_alpha": 0.6, "chat_format": "chatml",
          "no_repeat_ngram_size": 3, "suppress_tokens": [1]}),
    ],
)  # fmt: skip
def test_a_config(config: dict[str, Any], taken: dict[str, Any], left_out: dict[str, Any]) -> None:
    assert model_defaults(config) == (taken, left_out)


def test_every_field_of_this_transformers_is_taken_left_out_or_known_to_do_nothing() -> None:
    """One that a later version adds is named until somebody has looked at it."""
    taken, left_out = model_defaults(dict.fromkeys(vars(GenerationConfig()), "x"))
    sampled = {"top_p", "top_k", "min_p"}  # a temperature comes with do_sample alone
    assert taken.keys() == sampled | {
        "repetition_penalty",
        "min_new_tokens",
        "max_new_tokens",
        "stop",
    }
    assert {"num_beams", "penalty_alpha", "bad_words_ids", "guidance_scale"} <= left_out.keys()


def test_parameters_of_a_model_with_changes(caplog: pytest.LogCaptureFixture) -> None:
    model = SimpleNamespace(generation_config=GenerationConfig(**QWEN))
    assert SamplingParams.from_model(model) == SamplingParams(**TAKEN)
    greedy = SamplingParams.from_model(model, temperature=0, max_new_tokens=5)
    assert greedy == SamplingParams(**{**TAKEN, "temperature": 0, "max_new_tokens": 5})
    assert SamplingParams.from_model(SimpleNamespace()) == SamplingParams()
    assert not caplog.records
    model.generation_config = GenerationConfig(num_beams=4)
    with caplog.at_level(logging.WARNING):
        assert SamplingParams.from_model(model) == SamplingParams()
    assert "left out of the model's generation config: {'num_beams': 4}" in caplog.text
    model.generation_config = GenerationConfig(repetition_penalty=-1.0)
    with pytest.raises(ValueError, match="repetition_penalty must be"):
        SamplingParams.from_model(model)

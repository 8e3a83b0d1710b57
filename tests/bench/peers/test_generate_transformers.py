"""transformers' ``generate`` decodes what we decode: the likeliest tokens, as many as asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import tiny_model

from bench.peers.generate_transformers import TransformersGenerate

PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    "brought",
    [
        {"repetition_penalty": 1.3},
        {"max_time": 1e-9},
        {"suppress_tokens": list(range(32))},
        {"eos_token_id": list(range(64))},
        {"do_sample": True, "temperature": 9.0},
    ],
    ids=str,
)
def test_what_a_checkpoint_says_of_sampling_does_not_count(brought: dict[str, Any]) -> None:
    model = tiny_model("qwen3_moe")
    model.generation_config.update(**brought)
    seconds, tokens = TransformersGenerate(model).run(PROMPTS, 8)
    assert seconds > 0
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        assert len(new) == 8
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + new])).logits[0]
        assert new == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()

"""Acceptance is the decoder's own count, for each drafter in each way that can differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny import random_prompts, tiny_model

from training.upcycle.card.acceptance import (
    PROMPTS,
    Cell,
    acceptance,
    cells,
    distinct_trigrams,
    drafters,
    make_decoder,
    read_prompts,
)

NEW = 12


class Tokenizer:
    """Characters as ids; a template that marks its turns."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": ([0] if add_special_tokens else []) + [ord(c) for c in text]}

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def test_prompts_by_domain_and_the_templates_start_is_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"id": "a/1", "messages": [{"role": "user", "content": "x"}]}\n'
        '{"id": "b/1", "prompt": "y"}\n{"id": "a/2", "prompt": "z"}\n'
    )
    found = read_prompts(path, Tokenizer())
    assert found == {"a": [[ord(c) for c in "<user>x<assistant>"], [0, ord("z")]],
                     "b": [[0, ord("y")]]}  # fmt: skip


def test_the_built_in_prompts_fill_the_rows() -> None:
    counts = {domain: len(ids) for domain, ids in read_prompts(PROMPTS, Tokenizer()).items()}
    assert counts == {"code": 16, "chat": 16, "prose": 16}


def test_cells_are_each_measured_once() -> None:
    found = cells(drafters(["independent", "eagle"]), ["code", "chat"])
    assert len(set(found)) == len(found)
    assert Cell("eagle", "chat", 1.0, "coupled") in found
    assert {cell.verifier for cell in found if cell.drafter == "ngram"} == {"standard"}
    assert {c.temperature for c in found if c.verifier == "coupled"} == {1.0}


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_model("mixtral", num_experts_per_tok=2)


def test_acceptance_counts_what_the_decoder_kept(target: Any) -> None:
    prompts = random_prompts(5)
    make = lambda name, verifier="standard": make_decoder(target, name, None, verifier, None, 60)
    plain = acceptance(make("none"), prompts, 0.0, NEW)
    assert plain["alpha"] is None
    assert plain["tokens_per_round"] == 1.0

    fewer = make("self")
    assert fewer.drafter.top_k == 1
    drafted = acceptance(fewer, prompts, 0.0, NEW)
    assert drafted["digest"] == plain["digest"]
    assert drafted["tokens"] == 5 * NEW
    assert 0 < drafted["alpha"] < 1
    assert drafted["tokens_per_round"] == fewer.stats.acceptance_length > 1

    sampled = [acceptance(make(name, "coupled"), prompts, 1.0, NEW) for name in ("none", "self")]
    assert sampled[0]["digest"] == sampled[1]["digest"] != plain["digest"]


def test_distinct_trigrams() -> None:
    assert distinct_trigrams([[1, 2, 3, 4], [7, 7, 7, 7], [5]]) == (1 + 1 / 2) / 2
    assert distinct_trigrams([[1, 2]]) is None

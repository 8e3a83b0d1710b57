"""Where the texts come from, and in which order they are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from decoder import embedded
from decoder.model.loading import load_model
from training.upcycle import answers
from training.upcycle.answers import Writer, read_answers, write_answers
from training.upcycle.sources import Sources
from training.upcycle.texts import build_texts

TEMPLATE = "{% for m in messages %}def {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


class Chunks:
    """A budget of some chunks, of a minute each."""

    def __init__(self, most: int) -> None:
        self.most, self.tokens_done, self.seconds_before, self.chunks = most, 0, 0.0, -1

    @property
    def seconds(self) -> float:
        return self.seconds_before + 60.0 * (self.chunks + 1)

    @property
    def progress(self) -> float:
        self.chunks += 1
        return min(1.0, self.seconds_before / 60 / self.most + self.chunks / self.most)


@pytest.fixture(scope="module")
def writer() -> Writer:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(embedded.target_path())
    tokenizer.chat_template = TEMPLATE
    functions = ['def add(a, b):\n    """The sum of two numbers."""\n    return a + b\n']
    return Writer(load_model(embedded.draft_path(), dtype=torch.float32), tokenizer, functions)


def test_conversations_are_written_and_go_on(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "CHUNK", 8)
    monkeypatch.setattr(answers, "MAX_ANSWER", 8)
    monkeypatch.setattr(answers, "MAX_PROMPT", 24)
    file = tmp_path / "answers.jsonl"
    write_answers(writer, file, Chunks(2))
    lines = read_answers(file)
    # A completion in each eight needs no question; questions that do not end are left out.
    assert [line["index"] for line in lines if line["kind"] == "completion"] == [5, 13]
    for line in lines:
        assert 0 < line["prompt_tokens"] < len(line["token_ids"]) <= line["prompt_tokens"] + 8
    with file.open("a") as cut_short:
        cut_short.write(json.dumps(lines[-1])[:20])
    assert read_answers(file) == lines
    more = Chunks(3)  # of which two are spent
    write_answers(writer, file, more)
    longer = read_answers(file)
    assert longer[: len(lines)] == lines
    assert {line["index"] // 8 for line in longer} == {0, 1, 2}
    assert more.tokens_done == sum(len(line["token_ids"]) for line in longer)


def test_every_document_is_on_one_side(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.target_path())
    sources = Sources(
        train={"code": ["x = 1\n"], "docs": ["Words."]},
        held_out={"code": ["y = 2\n"], "docs": []},
    )
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"index": i, "token_ids": [i]}) + "\n" for i in range(200)))
    texts = build_texts(sources, file, tokenizer)
    assert tokenizer.decode(texts["train"]["code"][0]) == "x = 1\n"
    assert tokenizer.decode(texts["held_out"]["code"][0]) == "y = 2\n"
    chat = [{ids[0] for ids in texts[part]["chat"]} for part in ("train", "held_out")]
    assert chat[0] | chat[1] == set(range(200)) and not chat[0] & chat[1]
    assert 0 < len(chat[1]) < 20

"""Tokenizers of GGUF files: text is split and merged as llama.cpp's name for it says."""

from __future__ import annotations

import itertools
import random

import pytest
from support.hostile.gguf import BOOL, F32, LIST, TEXT, U32, Gguf

from decoder.model.loading import load_tokenizer

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def tokenizer(path, **fields):
    file = Gguf()
    template = fields.pop("template", None)
    file.fields |= {f"{KEY}{name}": value for name, value in fields.items()}
    if template is not None:
        file.fields["tokenizer.chat_template"] = (TEXT, template)
    path.write_bytes(file.bytes())
    return load_tokenizer(path)


def sentencepiece(path, **more):
    """Letters a to d and whatever of them has a score; bytes for the rest."""
    pieces = ["▁", "a", "b", "c", "d", "ab", "bc", "▁a", "abc", "cd", "abcd", "▁ab", "dd", "add"]
    drawn = random.Random(1)
    scores = [0.0, 0.0, *[0.0] * 256, *(-drawn.random() for _ in pieces), 0.0]
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|x|>"]
    kinds = [UNKNOWN, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), USER]
    fields = {
        "model": (TEXT, "llama"),
        "tokens": (LIST, (TEXT, tokens)),
        "token_type": (LIST, (5, kinds)),
        "scores": (LIST, (F32, scores)),
        "unknown_token_id": (U32, 0),
        "bos_token_id": (U32, 1),
        "eos_token_id": (U32, 1),
    }
    return tokenizer(path, **fields | more), dict(zip(tokens, scores, strict=True))


def merged(text, scores):
    """The definition: as long as any two neighbours make a piece, those with the highest score."""
    parts = list(text)
    while True:
        found = [
            (scores[left + right], -at)
            for at, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in scores
        ]
        if not found:
            return parts
        at = -max(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_sentencepieces_are_merged_by_their_scores(tmp_path):
    made, scores = sentencepiece(tmp_path / "m.gguf")
    drawn = random.Random(2)
    for _ in range(200):
        text = "".join(drawn.choice("abcd ") for _ in range(drawn.randrange(1, 12)))
        tokens = made.convert_ids_to_tokens(made.encode(text))
        assert tokens == ["<s>", *merged("▁" + text.replace(" ", "▁"), scores)], text
        assert made.decode(made.encode(text), skip_special_tokens=True) == text
    assert made.tokenize("aé<|x|>") == ["▁a", "<0xC3>", "<0xA9>", "<|x|>"]
    assert (made.bos_token, made.eos_token, made.unk_token) == ("<s>", "<s>", "<unk>")


def test_the_file_says_whether_a_text_begins_with_a_token_or_a_space(tmp_path):
    made, _ = sentencepiece(
        tmp_path / "m.gguf", add_bos_token=(BOOL, False), add_space_prefix=(BOOL, False)
    )
    assert made.convert_ids_to_tokens(made.encode("ab")) == ["ab"]
    assert made.decode(made.encode(" ab")) == " ab"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["it", "'s", "Ġ12345", "Ġ!"]),
        ("smollm", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ!"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "45", "Ġ!"]),
        ("qwen2", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ!"]),
    ],
)
def test_text_is_split_as_the_file_names_it(pre, pieces, tmp_path):
    made = tokenizer(tmp_path / "m.gguf", pre=(TEXT, pre))
    split = made.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345 !")
    assert [piece for piece, _ in split] == pieces


def test_a_byte_level_text_begins_with_a_token_where_llama_3_or_the_file_says_so(tmp_path):
    bos = {"bos_token_id": (U32, 0)}
    for pre, said, begun in (
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": (BOOL, False)}, False),
        ("qwen2", {}, False),
        ("qwen2", {"add_bos_token": (BOOL, True)}, True),
    ):
        made = tokenizer(tmp_path / "m.gguf", pre=(TEXT, pre), **bos, **said)
        assert made.encode("abc") == ([0] if begun else []) + [3, 4], pre


def test_the_chat_template_is_the_files(tmp_path):
    made = tokenizer(tmp_path / "m.gguf", template="{{ messages[0]['content'] }}|")
    chat = [{"role": "user", "content": "ab"}]
    assert made.apply_chat_template(chat, tokenize=False) == "ab|"
    assert tokenizer(tmp_path / "m.gguf").chat_template is None

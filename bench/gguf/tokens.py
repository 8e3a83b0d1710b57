"""A tokenizer's tokens in the words of a GGUF file."""

from __future__ import annotations

import json
from typing import Any

# How text is split before tokens are merged, as ``tokenizers`` describes it, and llama.cpp's name.
_DIGITS_ALONE = [
    ("Digits", {"individual_digits": True}),
    ("ByteLevel", {"use_regex": True, "add_prefix_space": False}),
]
_SPLITS = {"smollm": _DIGITS_ALONE}


def add_tokens(writer: Any, tokenizer: Any | None, vocab_size: int) -> bool:
    """Add a byte-level BPE's tokens, or none where llama.cpp could not split text alike.

    Args:
        writer: a ``gguf.GGUFWriter``.
        tokenizer: a fast tokenizer of transformers, or None.
        vocab_size: of the model; ids beyond the tokenizer's are written as unused.

    Returns:
        Whether tokens were added.

    Raises:
        ValueError: a token beyond the model's.
    """
    from gguf import TokenType

    description = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer else {}
    split = _split_name(description)
    if tokenizer is None or split is None:
        writer.add_tokenizer_model("none")
        return False
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {vocab_size}")
    whole = {
        token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        for token in description["added_tokens"]
    }
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
        kinds[index] = whole.get(index, TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in description["model"]["merges"]])
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("unk_token_id", writer.add_unk_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        if (index := getattr(tokenizer, name)) is not None:
            add(index)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    return True


def _split_name(description: dict[str, Any]) -> str | None:
    """llama.cpp's name of a byte-level BPE's way to split text, or None where it has none."""
    if description.get("model", {}).get("type") != "BPE" or description["normalizer"]:
        return None
    steps = (description["pre_tokenizer"] or {}).get("pretokenizers", [])
    for name, wanted in _SPLITS.items():
        kinds = [step["type"] for step in steps]
        if kinds == [kind for kind, _ in wanted] and all(
            step[key] == value
            for step, (_, options) in zip(steps, wanted, strict=True)
            for key, value in options.items()
        ):
            return name
    return None

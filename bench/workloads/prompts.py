"""Prompt sets: HumanEval, MT-bench, any JSONL, and random tokens for models without a tokenizer."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# By the paper's names; files are taken as they are published.
DATA_FILES = {"humaneval": "HumanEval.jsonl.gz", "mt_bench": "mt_bench.jsonl"}
# What a chat model is asked where a data set's prompt is not itself a question.
QUESTIONS = {"humaneval": "Complete this function:\n\n```python\n{}\n```"}


def prompts_file(source: str, folder: Path = Path()) -> Path:
    """Where a named data set's file is looked for, or the JSONL file itself."""
    return folder / DATA_FILES[source] if source in DATA_FILES else Path(source)


def load_prompts(source: str, folder: Path = Path()) -> list[str]:
    """Prompt texts of a named data set or of a JSONL file.

    Args:
        source: ``humaneval``, ``mt_bench`` or a path; a line holds ``prompt`` or ``turns``.
        folder: where the files of the named sets are.

    Raises:
        FileNotFoundError: the file is not there; says where it was looked for.
        ValueError: a line that is no JSON object, or holds no prompt.
    """
    path = prompts_file(source, folder)
    if not path.exists():
        raise FileNotFoundError(f"no prompts at {path} (--prompts-dir names the data sets' folder)")
    opener = gzip.open if path.suffix == ".gz" else open
    prompts = []
    with opener(path, "rt", encoding="utf-8-sig") as file:  # whatever the locale's encoding is
        for number, text in enumerate(file, start=1):
            if text.strip():
                prompts.append(_prompt(text, f"{path}:{number}"))
    return prompts


def _prompt(text: str, place: str) -> str:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(line, dict):
        raise ValueError(f"{place} must be a JSON object, got a {type(line).__name__}")
    prompt = line.get("prompt") or (line.get("turns") or [None])[0]
    if not isinstance(prompt, str):
        raise ValueError(f"{place} needs prompt or turns that are text, got {sorted(line)}")
    return prompt


def prompt_tokens(tokenizer: Any, source: str, folder: Path = Path()) -> list[list[int]]:
    """A data set's prompts as its model is given them, in an order that mixes their categories.

    Through the chat template where the tokenizer has one: HumanEval's functions inside a question
    (``QUESTIONS``), MT-bench's first turns as they are. Other models continue the raw text.
    """
    texts = load_prompts(source, folder=folder)
    random.Random(0).shuffle(texts)
    if not tokenizer.chat_template:
        return [tokenizer(text)["input_ids"] for text in texts]
    question = QUESTIONS.get(source, "{}")
    asked = [[{"role": "user", "content": question.format(text.rstrip())}] for text in texts]
    chats = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    # The template writes the begin-of-text itself.
    return [tokenizer(chat, add_special_tokens=False)["input_ids"] for chat in chats]


def first_prompts(prompts: Sequence[list[int]], batch: int, source: str) -> list[list[int]]:
    """A prompt for each row of a batch.

    Raises:
        ValueError: there are fewer, and a line of this batch would be of a smaller one.
    """
    if len(prompts) < batch:
        raise ValueError(f"{source} has {len(prompts)} prompts, expected {batch}")
    return [list(prompt) for prompt in prompts[:batch]]


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """``count`` prompts of ``length`` uniform token ids, seeded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()

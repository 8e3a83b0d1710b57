"""Prompt sets: HumanEval, MT-bench, any JSONL, and random tokens for models without a tokenizer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
DATA_FILES = {"humaneval": "HumanEval.jsonl.gz", "mt-bench": "mt_bench.jsonl"}


def load_prompts(source: str, limit: int | None = None, data: Path = DATA) -> list[str]:
    """Prompt texts of a named data set or of a JSONL file.

    Args:
        source: ``humaneval``, ``mt-bench`` or a path; a line holds ``prompt`` or ``turns``.
        limit: first prompts only.
        data: folder of the named sets.

    Raises:
        FileNotFoundError: the file is not there; says where it was looked for.
        ValueError: a line without prompt.
    """
    path = data / DATA_FILES[source] if source in DATA_FILES else Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no prompts at {path} (--data names the folder of the data sets)")
    opener = gzip.open if path.suffix == ".gz" else open
    prompts = []
    with opener(path, "rt") as file:
        for number, text in enumerate(file, start=1):
            line = json.loads(text)
            prompt = line.get("prompt") or (line.get("turns") or [None])[0]
            if prompt is None:
                raise ValueError(f"{path}:{number} needs prompt or turns, got {sorted(line)}")
            prompts.append(prompt)
    return prompts[:limit]


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """``count`` prompts of ``length`` uniform token ids, seeded."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()

"""What each draft is worth on the target: acceptance and tokens per round, as the decoder counts.

Prompts are lines as ``python -m decoder generate`` reads them; the part of their ``id`` before the
slash is the domain. Text without messages is continued as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import DraftOptions, build_drafter
from decoder.drafters.table import DRAFTERS
from decoder.sampling.sampler import VerifierName

from .journal import digest

GAMMA = 4
ROWS = 16
SEED = 20
PROMPTS = Path(__file__).with_name("prompts.jsonl")
LOOKUPS = ("ngram", "suffix")  # propose text seen before, with certainty


class Cell(NamedTuple):
    """One measurement: who drafts, on what, how it is sampled and verified."""

    drafter: str
    domain: str
    temperature: float
    verifier: VerifierName


def read_prompts(path: Path, tokenizer: Any) -> dict[str, list[list[int]]]:
    """Token ids of the prompts by domain, messages through the tokenizer's chat template."""
    prompts: dict[str, list[list[int]]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if messages := line.get("messages"):
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(line["prompt"])["input_ids"]
        prompts.setdefault(line["id"].partition("/")[0], []).append(ids)
    return prompts


def cells(drafters: Sequence[str], domains: Sequence[str]) -> list[Cell]:
    """Every cell of the table.

    Greedy output is the same under every verifier, and a lookup's proposal is a certainty, which
    ``coupled`` accepts as often as ``standard``: both are measured once.
    """
    found = []
    for drafter in drafters:
        for domain, temperature in product(domains, (0.0, 1.0)):
            found.append(Cell(drafter, domain, temperature, "standard"))
        if drafter not in LOOKUPS:
            found += [Cell(drafter, domain, 1.0, "coupled") for domain in domains]
    return found


def drafters(drafts: Iterable[str]) -> list[str]:
    """Names of the drafters to measure: those that have a draft, given here, and those without."""
    return [*drafts, "self", *(name for name in LOOKUPS if name in DRAFTERS)]


def make_decoder(
    target: Any,
    drafter: str,
    draft: Path | None,
    verifier: VerifierName,
    tokenizer: Any,
    max_length: int,
) -> SpeculativeDecoder:
    """A decoder that drafts GAMMA tokens every round; the target drafts with one expert per token.

    Raises:
        UserError: a draft that cannot be used with this target.
    """
    options = DraftOptions(self_top_k=1, tokenizer=tokenizer)
    made = build_drafter(drafter, target, draft, options)
    return SpeculativeDecoder(
        target, made, GAMMA, verifier, max_batch_size=ROWS, max_length=max_length
    )


def acceptance(
    decoder: SpeculativeDecoder, prompts: Sequence[list[int]], temperature: float, new: int
) -> dict[str, Any]:
    """What the decoder counted over these prompts, each continued by at most ``new`` tokens.

    Returns:
        ``alpha``, ``alpha_by_position``, ``sigma``, ``tokens_per_round`` and ``tokens`` as in
        ``DecoderStats``; ``digest`` of all output tokens, equal where outputs are; ``trigrams``,
        different over all 3-grams per output: near 0 for loops, which are easy to draft.
    """
    params = [
        SamplingParams(temperature=temperature, max_new_tokens=new, seed=SEED + i)
        for i in range(len(prompts))
    ]
    outputs = [output.token_ids for output in decoder.generate(prompts, params)]
    stats = decoder.stats
    return {
        "alpha": stats.alpha,
        "alpha_by_position": stats.alpha_by_position,
        "sigma": stats.sigma,
        "tokens_per_round": stats.acceptance_length,
        "tokens": stats.tokens,
        "digest": digest(outputs),
        "trigrams": distinct_trigrams(outputs),
    }


def distinct_trigrams(rows: Sequence[Sequence[int]]) -> float | None:
    """Different 3-grams over all 3-grams, mean over the rows that have any."""
    trigrams = [list(zip(ids, ids[1:], ids[2:], strict=False)) for ids in rows]
    ratios = [len(set(each)) / len(each) for each in trigrams if each]
    return sum(ratios) / len(ratios) if ratios else None

"""A whole data set decoded autoregressively and speculatively: which outputs are equal, how fast.

Unlike a cell of the paper's grid this is a run as a user has it: rows are refilled as sequences
end, prompts are read in it, an end of sequence ends a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench.workloads.kept import draft_format
from bench.workloads.trained import TrainedPair
from decoder import SamplingParams, SpeculativeDecoder
from decoder.cli.compare import compare, forecast, warmed_up
from decoder.drafters import build_drafter
from decoder.gamma.base import AUTO
from decoder.sampling.sampler import VerifierName


@dataclass(frozen=True, slots=True)
class Settings:
    """How a data set is decoded.

    Attributes:
        gamma: draft length as text, or ``auto``.
        batch: rows.
        new_tokens: most of each output.
        repetitions: of both ways, in turn.
    """

    gamma: str
    verifier: VerifierName
    temperature: float
    batch: int
    new_tokens: int
    repetitions: int
    dtype: torch.dtype
    device: str


def measure_dataset(
    pair: TrainedPair, prompts: list[list[int]], settings: Settings
) -> dict[str, Any]:
    """Both ways over all prompts: the fields of a ``compare`` line.

    Returns:
        What was decoded and how, ``Comparison.as_dict()``, the drafts' ``alpha`` and ``sigma``, and
        ``predicted``: the ratio that rounds timed before the run forecast at this alpha.
    """
    target = pair.load_target(settings.dtype, settings.device)
    length = max(map(len, prompts)) + settings.new_tokens
    options: Any = {"max_batch_size": settings.batch, "max_length": length}
    plain = SpeculativeDecoder(target, None, 0, settings.verifier, **options)
    gamma: Any = settings.gamma if settings.gamma == AUTO else int(settings.gamma)
    drafter = build_drafter(pair.drafter, target, pair.draft)
    speculative = SpeculativeDecoder(target, drafter, gamma, settings.verifier, **options)
    params = SamplingParams(temperature=settings.temperature, max_new_tokens=settings.new_tokens)
    seeded = [{"token_ids": prompt, "seed": number} for number, prompt in enumerate(prompts)]
    requests, costs = warmed_up(plain, speculative, seeded, params)
    result = compare(plain, speculative, requests, settings.repetitions)
    alphas = [result.speculative_stats.alpha] * len(requests)
    lengths = [len(output.token_ids) for output in result.plain]
    return {
        "target": pair.name,
        "drafter": pair.drafter,
        "draft_format": draft_format(drafter),
        "gamma": settings.gamma,
        "verifier": settings.verifier,
        "temperature": settings.temperature,
        "B": settings.batch,
        "new_tokens": settings.new_tokens,
        "repetitions": settings.repetitions,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "alpha": result.speculative_stats.alpha,
        "sigma": result.speculative_stats.sigma,
        "predicted": forecast(costs, speculative, alphas, lengths),
        **result.as_dict(),
    }

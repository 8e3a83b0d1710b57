"""One (alpha, B) of automatic gamma: against autoregressive decoding and every fixed gamma."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure.timer import interleaved, summarize
from bench.runs.subject import Subject, drafter_for
from bench.workloads.kept import draft_format
from bench.workloads.prompts import first_prompts, random_prompts
from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters import ReplayDrafter
from decoder.engine.profile_rounds import profile_rounds
from decoder.gamma.acceptance import AcceptanceEstimator
from decoder.gamma.auto import AutoGamma
from decoder.gamma.base import AUTO, FixedGamma

PROMPT_TOKENS = 32
PLAIN, TWIN = "0", "0 again"


@dataclass(frozen=True, slots=True)
class Settings:
    """What stays the same over all cells of a run.

    Attributes:
        gammas: fixed draft lengths to compare with; autoregressive decoding is always one.
        new_tokens: of each prompt.
        rounds: most rounds of a cell.
        budget_s: seconds of rounds of a cell.
        cold: forget the acceptance seen before every run.
    """

    gammas: Sequence[int]
    new_tokens: int
    rounds: int
    budget_s: float
    cold: bool


def measure_automatic(subject: Subject, batch: int, settings: Settings) -> dict[str, Any]:
    """Ratios of one cell, taken round by round: the fields of an ``auto`` line.

    Raises:
        RuntimeError: a gamma changed the output.
        ValueError: the subject's prompts are fewer than the batch.
    """
    if subject.prompts is None:
        prompts = random_prompts(batch, PROMPT_TOKENS, subject.target.config.vocab_size)
    else:
        prompts = first_prompts(subject.prompts, batch, "the data set")
    params = SamplingParams(max_new_tokens=settings.new_tokens, ignore_eos=True)
    length = max(map(len, prompts)) + settings.new_tokens
    plain = _plain(subject, batch, length)
    answers = [list(o.token_ids) for o in plain.generate(prompts, params)]
    decoders = {PLAIN: plain, TWIN: _plain(subject, batch, length)}
    # Fixed draft lengths take turns in one decoder: a cache of each would be many.
    fixed = {str(gamma): FixedGamma(gamma) for gamma in settings.gammas}
    longest = FixedGamma(max(settings.gammas))
    decoders |= dict.fromkeys(fixed, _speculative(subject, longest, prompts, answers, length))
    decoders[AUTO] = _speculative(subject, AUTO, prompts, answers, length)
    profiled = profile_rounds(decoders[AUTO])

    def timed(name: str) -> Callable[[int], float]:
        def one(_round: int) -> float:
            controller = fixed.get(name, decoders[name].controller)
            decoders[name].controller = controller
            if settings.cold and isinstance(controller, AutoGamma):
                controller.acceptance = AcceptanceEstimator(controller.max_gamma)
            begin = time.perf_counter()
            outputs = decoders[name].generate(prompts, params)
            seconds = time.perf_counter() - begin
            if [list(o.token_ids) for o in outputs] != answers:
                raise RuntimeError(f"gamma {name} changed the output at B={batch}")
            return seconds

        return one

    samples = interleaved(
        {name: timed(name) for name in decoders}, rounds=settings.rounds, budget_s=settings.budget_s
    )
    return ratios(samples) | {
        "draft_format": draft_format(decoders[AUTO].drafter),
        "profiled": profiled,
        "cold": settings.cold,
        "new_tokens": settings.new_tokens,
        "why": decoders[AUTO].controller.explain(),
    }


def _plain(subject: Subject, batch: int, length: int) -> SpeculativeDecoder:
    return SpeculativeDecoder(subject.target, None, 0, max_batch_size=batch, max_length=length)


def _speculative(
    subject: Subject,
    gamma: Any,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    length: int,
) -> SpeculativeDecoder:
    drafter = drafter_for(subject)
    if isinstance(drafter, ReplayDrafter):
        drafter.recordings.update({tuple(p): a for p, a in zip(prompts, answers, strict=True)})
    return SpeculativeDecoder(
        subject.target, drafter, gamma, max_batch_size=len(prompts), max_length=length
    )


def ratios(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians over rounds: seconds of each variant, and their ratios within a round."""
    medians = {name: summarize(seconds).median for name, seconds in samples.items()}
    fixed = min((name for name in samples if name not in (TWIN, AUTO)), key=medians.__getitem__)

    def ratio(name: str, other: str) -> float:
        pairs = zip(samples[name], samples[other], strict=True)
        return summarize([a / b for a, b in pairs]).median

    return {
        "seconds": medians,
        "rounds": len(samples[PLAIN]),
        "best_fixed": int(fixed),
        "noise": ratio(PLAIN, TWIN),
        "against_ar": ratio(PLAIN, AUTO),
        "against_best": ratio(fixed, AUTO),
    }

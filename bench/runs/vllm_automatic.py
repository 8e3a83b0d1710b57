"""One cell of automatic gamma inside vLLM: our scheduler against every fixed number of drafts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.measure.timer import interleaved
from bench.peers.vllm_generate import Tokens, VllmGenerate
from bench.runs.automatic import PLAIN, TWIN, Settings, ratios
from bench.runs.in_vllm import agreement
from decoder.gamma.base import AUTO

# Of each draft token the probability to be left as drafted: always, or no longer from half of the
# new tokens on, and the other way round.
TEXTS = {"as drafted": [1.0], "worse half-way": [1.0, 0.4], "better half-way": [0.4, 1.0]}


def measure_vllm_automatic(
    engine: VllmGenerate, text: str, prompts: Tokens, settings: Settings
) -> dict[str, Any]:
    """Ratios of a cell, taken round by round: the fields of an ``auto`` line.

    Fixed numbers take turns in one engine. Nothing is measured at start-up, and what our scheduler
    has learnt it keeps from run to run, of other cells as well.

    Args:
        text: a key of ``TEXTS``.
    """
    gammas: dict[str, int | str] = {PLAIN: 0, TWIN: 0}
    gammas |= {str(gamma): gamma for gamma in settings.gammas} | {AUTO: AUTO}
    outputs: dict[str, Tokens] = {}

    def timed(name: str) -> Callable[[int], float]:
        def one(_round: int) -> float:
            engine.choose(gammas[name], TEXTS[text])
            seconds, outputs[name] = engine.run(prompts, settings.new_tokens)
            return seconds

        return one

    samples = interleaved(
        {name: timed(name) for name in gammas}, rounds=settings.rounds, budget_s=settings.budget_s
    )
    return ratios(samples) | {
        "vllm": engine.version,
        "experts": engine.experts,
        "cold": settings.cold,
        "new_tokens": settings.new_tokens,
        "agrees_with_plain": {name: agreement(outputs[name], outputs[PLAIN]) for name in gammas},
        "agrees_again": agreement(outputs[TWIN], outputs[PLAIN]),
        "why": engine.explain(),
    }

"""How long a whole run takes, from what its rounds cost and what drafts are accepted.

A run ends in a tail: sequences finish at different times, the slowest alone. Who finishes when is
chance, so runs are drawn and their times averaged; plain decoding goes the same way with no drafts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from .acceptance import expected_tokens
from .step_cost import RoundCost

_DRAWN = 20_000  # tokens drawn at least, over all runs: the mean then moves by less than 1 %
_CONTEXT = 0  # measured costs do not ask for it

Seconds = Callable[[int, int], float]  # of a round: live rows, draft length
Choice = Callable[[int], int]  # live rows -> draft length


@dataclass(frozen=True, slots=True)
class RunCosts:
    """What a run's parts cost on this machine.

    Attributes:
        rounds: seconds of a round; gamma 0 is a step of plain decoding.
        plain_prompt, speculative_prompt: seconds until a prompt has its first token.
    """

    rounds: RoundCost
    plain_prompt: float
    speculative_prompt: float


def forecast_ratio(
    costs: RunCosts,
    alphas: Sequence[float],
    lengths: Sequence[int],
    gammas: Sequence[int],
    batch_size: int,
) -> float:
    """Tokens per second of speculative over plain decoding, prefill included.

    Args:
        alphas: acceptance rate of each sequence's drafts, independent of one another.
        lengths: tokens of each sequence's output.
        gammas: draft lengths; at every number of live rows the one with most tokens per second.
        batch_size: sequences decoded at once.
    """
    if len(alphas) != len(lengths) or not lengths or not gammas:
        raise ValueError(
            "expected one alpha for each length, and gammas, got "
            f"{len(alphas)}, {len(lengths)} and {len(gammas)}"
        )
    seconds: Seconds = cache(lambda batch, gamma: costs.rounds(batch, gamma, _CONTEXT))
    sequences = list(zip(alphas, lengths, strict=True))
    draws = random.Random(0)
    runs = max(1, _DRAWN // sum(lengths))
    choose = _fastest(seconds, alphas, gammas)
    drafting = [_run(seconds, sequences, choose, batch_size, draws) for _ in range(runs)]
    plain = _run(seconds, sequences, lambda batch: 0, batch_size, draws)
    count = len(sequences)
    speculative = count * costs.speculative_prompt + sum(drafting) / runs
    return (count * costs.plain_prompt + plain) / speculative


def _fastest(seconds: Seconds, alphas: Sequence[float], gammas: Sequence[int]) -> Choice:
    each = [expected_tokens([alpha] * max(gammas)) for alpha in alphas]
    tokens = [sum(column) for column in zip(*each, strict=True)]
    return cache(lambda batch: max(gammas, key=lambda gamma: tokens[gamma] / seconds(batch, gamma)))


def _run(
    seconds: Seconds,
    sequences: Sequence[tuple[float, int]],
    choose: Choice,
    batch_size: int,
    draws: random.Random,
) -> float:
    """Seconds of all rounds of one run; a waiting sequence takes the place of one that ended."""
    # The first token comes with the prompt.
    waiting = [(alpha, length - 1) for alpha, length in reversed(sequences) if length > 1]
    live: list[tuple[float, int]] = []
    total = 0.0
    while live or waiting:
        while waiting and len(live) < batch_size:
            live.append(waiting.pop())
        gamma = min(choose(len(live)), max(left for _, left in live) - 1)
        total += seconds(len(live), gamma)
        after = [(alpha, left - 1 - _accepted(alpha, gamma, draws)) for alpha, left in live]
        live = [(alpha, left) for alpha, left in after if left > 0]
    return total


def _accepted(alpha: float, gamma: int, draws: random.Random) -> int:
    count = 0
    while count < gamma and draws.random() < alpha:
        count += 1
    return count

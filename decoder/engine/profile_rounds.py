"""A start-up profile: what rounds cost here, measured before the first request is decoded.

``gamma="auto"`` can learn costs from the rounds it runs, but pays for it with the first of them.
This runs the decoder itself on short made-up prompts, at a few batch sizes and draft lengths, and
hands the controller what it saw. It measures time only: acceptance is learnt from real text.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence

from decoder.drafters.base import forget_finished
from decoder.errors import RequestFailed
from decoder.gamma.auto import AutoGamma
from decoder.gamma.base import FixedGamma
from decoder.gamma.step_cost import measure_costs
from decoder.model.capture import captured
from decoder.requests.params import SamplingParams

from .loop import SpeculativeDecoder

logger = logging.getLogger(__name__)

_PROMPT = 16  # tokens of a made-up prompt
_BATCHES = (1, 4, 16, 64, 256)  # and the largest
_PLAIN_ROUNDS = 5
_GAMMAS = (1, 3)  # and the longest
_REPEATS = 2


class RoundLog(FixedGamma):
    """A fixed gamma that keeps what it is told of each round.

    Args:
        max_gamma: longest draft that the decoder it is given to must make room for.

    Attributes:
        rounds: gamma, live rows, tokens emitted, seconds by phase.
        capturing: places of those in which graphs were captured.
    """

    def __init__(self, gamma: int = 0, max_gamma: int = 0) -> None:
        super().__init__(gamma)
        self.max_gamma = max(gamma, max_gamma)
        self.rounds: list[tuple[int, int, int, Mapping[str, float]]] = []
        self.capturing: set[int] = set()
        self._captured = captured()

    def observe(
        self,
        gamma: int,
        batch: int,
        drafted: Sequence[int],
        accepted: Sequence[int],
        times: Mapping[str, float],
    ) -> None:
        """Keep the round."""
        if captured() > self._captured:
            self.capturing.add(len(self.rounds))
            self._captured = captured()
        self.rounds.append((gamma, batch, sum(accepted) + batch, dict(times)))

    def full(self, batch: int) -> list[tuple[int, Mapping[str, float]]]:
        """(emitted, seconds by phase) of rounds with ``batch`` live rows that captured nothing.

        But for the first, which warms up.
        """
        return [self.rounds[place][2:] for place in self.places(batch)]

    def places(self, batch: int) -> list[int]:
        """Where in ``rounds`` those are that ``full`` gives."""
        return [
            place
            for place, (_, live, _, _) in enumerate(self.rounds)
            if live == batch and place not in self.capturing
        ][1:]


class NoProfile(Exception):
    """Why none could be taken."""


def profiled_batches(largest: int) -> list[int]:
    """Batch sizes to measure at, ascending; costs between them are interpolated."""
    return [size for size in _BATCHES if size < largest] + [largest]


def profiled_gammas(longest: int) -> list[int]:
    """Draft lengths to measure at, ascending."""
    return [gamma for gamma in _GAMMAS if gamma < longest] + [longest]


def profile_rounds(decoder: SpeculativeDecoder, budget_s: float = 5.0) -> bool:
    """Measure round times and give them to the decoder's controller.

    Args:
        decoder: idle; unless its ``gamma`` is ``"auto"`` there is nothing to do.
        budget_s: measure again only within this time; give up, and leave the controller to learn,
            when one timing of each takes longer.

    Returns:
        Whether the controller now has a profile; where one could not be taken, a log line says why.
    """
    controller = decoder.controller
    if not isinstance(controller, AutoGamma):
        return False
    longest = controller.max_gamma
    recorded = 2 * (longest + 1)
    deadline = time.perf_counter() + budget_s
    seen: set[int] = set()

    def measure(batch: int, gamma: int) -> float:
        if _PROMPT + recorded + 1 > decoder.max_length:
            raise NoProfile(f"its prompts do not fit into {decoder.max_length} tokens")
        if batch not in seen and time.perf_counter() > deadline:
            raise NoProfile(f"it would take longer than {budget_s:g} s")
        # The first plain run goes on for as long as drafts will: a replay drafter records it.
        plain = _PLAIN_ROUNDS if batch in seen else recorded
        seen.add(batch)
        new_tokens = 1 + (2 * (gamma + 1) if gamma else plain)
        log = decoder.controller = RoundLog(gamma)
        decoder.generate(
            [_prompt(row, decoder.runner.vocab_size) for row in range(batch)],
            SamplingParams(max_new_tokens=new_tokens, ignore_eos=True),
        )
        seconds = [sum(t.values()) for g, live, _, t in log.rounds if (g, live) == (gamma, batch)]
        if not seconds:
            raise NoProfile(f"the drafter proposed nothing at gamma {gamma}")
        return statistics.median_low(seconds)

    batches, gammas = profiled_batches(decoder.max_batch_size), profiled_gammas(longest)
    stats = decoder.stats
    try:
        costs = measure_costs(measure, batches, gammas, _REPEATS, deadline)
    except (NoProfile, RequestFailed) as reason:
        logger.info("no start-up profile: %s", reason)
        return False
    finally:
        decoder.controller, decoder.stats = controller, stats
        forget_finished(decoder.drafter)
    controller.use_costs(costs)
    return True


def _prompt(row: int, vocab_size: int) -> list[int]:
    """Token ids that differ from row to row."""
    return [(7919 * (row + 1) + 104_729 * place) % vocab_size for place in range(_PROMPT)]

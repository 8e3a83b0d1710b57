"""What the rounds of a comparison will cost: a few of each, on its own prompts, before it starts.

Plain and speculative rounds are timed in turn, as the runs will be. One prefill serves all batch
sizes: rows are given up on the way, as they will end in a run.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import median_low

from decoder.drafters import ReplayDrafter
from decoder.errors import UserError
from decoder.gamma.auto import AutoGamma
from decoder.gamma.base import FixedGamma
from decoder.gamma.forecast import RunCosts
from decoder.gamma.step_cost import MeasuredCost
from decoder.requests.params import SamplingParams

from .loop import SpeculativeDecoder
from .metrics import DecoderStats
from .profile_rounds import NoProfile, RoundLog, profiled_batches, profiled_gammas

logger = logging.getLogger(__name__)

_ROUNDS = 4  # of each kind at each batch size
# Tokens of a row before anything is timed: beginnings are alike, are routed to the same experts,
# and cost half of what later steps do.
_BEGINNING = 12
_BUDGET_S = 15.0  # no smaller batch size is begun after it

Times = dict[tuple[int, int], list[float]]  # (batch, gamma) -> seconds of each round


def profile_pair(
    plain: SpeculativeDecoder,
    speculative: SpeculativeDecoder,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> RunCosts | None:
    """Time rounds of two decoders on the same target, idle, which have run before.

    A controller that chooses draft lengths by their costs is given these; nothing else of the
    decoders is changed.

    Args:
        prompts: token ids; as many as are decoded at once are used.

    Returns:
        ``None`` where there is nothing to time; a log line says why.
    """
    controller = speculative.controller
    timers = [_Timer(decoder) for decoder in (plain, speculative)]
    try:
        gammas = _gammas(speculative)
        batches = profiled_batches(min(len(prompts), plain.max_batch_size))[::-1]
        timed_tokens = len(batches) * _ROUNDS * sum(gamma + 1 for gamma in gammas)
        longest = 1 + timed_tokens + _BEGINNING + 2 * (max(gammas) + 1)
        endless = {"ignore_eos": True, "stop": (), "stop_token_ids": ()}
        lengths = {"min_new_tokens": 0, "max_new_tokens": longest}
        timed = params.updated({**endless, **lengths, "seed": 0})
        prefills = [
            timer.prefill(prompts[: batches[0]], timed) + timer.begin(gamma)
            for timer, gamma in zip(timers, (0, max(gammas)), strict=True)
        ]
        costs = _measured(timers[0], timers[1], batches, gammas)
    except (NoProfile, UserError) as reason:
        logger.info("no profile of the two: %s", reason)
        return None
    finally:
        for timer in timers:
            timer.close()
    if isinstance(controller, AutoGamma):
        controller.use_costs(costs)
    return RunCosts(costs, *(seconds / batches[0] for seconds in prefills))


def _gammas(decoder: SpeculativeDecoder) -> list[int]:
    controller = decoder.controller
    if isinstance(decoder.drafter, ReplayDrafter):
        raise NoProfile("a replay drafter would take its outputs for recordings")
    if isinstance(controller, AutoGamma):
        return profiled_gammas(controller.max_gamma)
    if isinstance(controller, FixedGamma) and controller.gamma:
        return [controller.gamma]
    raise NoProfile("nothing is drafted")


def _measured(
    plain: _Timer, speculative: _Timer, batches: Sequence[int], gammas: Sequence[int]
) -> MeasuredCost:
    deadline = time.perf_counter() + _BUDGET_S
    seen: Times = defaultdict(list)
    for batch in batches:
        if time.perf_counter() > deadline:
            break
        plain.keep(batch)
        speculative.keep(batch)
        for _ in range(_ROUNDS):
            seen[batch, 0].append(plain.round(0))
            for gamma in gammas:
                seen[batch, gamma].append(speculative.round(gamma))
    # Times err on one side: the first round of its kind pays for buffers, any may be stalled.
    return MeasuredCost({key: median_low(times) for key, times in seen.items()})


class _Timer:
    """Steps a decoder with the draft length asked for, and leaves it as it was."""

    def __init__(self, decoder: SpeculativeDecoder) -> None:
        self._decoder = decoder
        self._before = decoder.controller, decoder.stats
        self._log = RoundLog()

    def prefill(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> float:
        """Start the prompts; seconds until all have their first token."""
        self._decoder.controller, self._decoder.stats = self._log, DecoderStats()
        self._requests = [self._decoder.add(list(prompt), params) for prompt in prompts]
        return self._step()

    def begin(self, gamma: int) -> float:
        """Go on, by rounds of this draft length, until rows have left their beginnings.

        Returns:
            Seconds by which the first was longer than the next: a draft reads the prompts in it.
        """
        first, *others = [self.round(gamma) for _ in range(max(2, -(-_BEGINNING // (gamma + 1))))]
        return max(0.0, first - min(others))

    def keep(self, rows: int) -> None:
        """Give up all but so many."""
        for request in self._requests[rows:]:
            self._decoder.cancel(request)
        del self._requests[rows:]

    def round(self, gamma: int) -> float:
        """Seconds of a round of this draft length."""
        self._log.gamma = gamma
        seconds = self._step()
        ran = [(found, rows) for found, rows, *_ in self._log.rounds[-1:]]
        if ran != [(gamma, len(self._requests))]:
            raise NoProfile(f"expected {len(self._requests)} rows at gamma {gamma}, got {ran}")
        return seconds

    def close(self) -> None:
        """Give everything up."""
        self._decoder.clear()
        self._decoder.controller, self._decoder.stats = self._before

    def _step(self) -> float:
        start = time.perf_counter()
        self._decoder.step()
        return time.perf_counter() - start

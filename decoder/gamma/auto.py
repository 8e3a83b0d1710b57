"""Chooses the draft length of every round: the one that emits most tokens per second.

``goodput(gamma) = E[tokens emitted per row | gamma] / seconds(batch, gamma, context)``, with
acceptance from a running estimate per position and costs from a profile corrected by the rounds
actually run, or from those rounds alone. ``gamma = 0`` (plain autoregressive decoding) is one of
the choices, so that a bad drafter, a bad batch size or a bad machine ends in ordinary decoding, not
in a slowdown. Exploration is paid from a budget of at most 0.5 % of the time (``probing.py``).

Between decisions a round costs the controller next to nothing: rounds are kept as they come and
learnt from when the next decision is due.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import accumulate
from statistics import median_low
from typing import NamedTuple

from .acceptance import AcceptanceEstimator
from .base import DEFAULT_MAX_GAMMA, Counts, Times
from .learned_cost import LearnedCost
from .probing import Probe, ProbeBudget
from .step_cost import CorrectedCost, RoundCost, bucket_of

_SWITCH_GAIN = 0.02  # relative goodput a new gamma must add: below it, noise would decide
_LEAVE_GAIN = 0.04  # the same for leaving plain decoding, where going to and fro costs catching up
_PROBE_CREDIT = 0.3  # of one plain step may be lost to probing at once
_PLAN_EVERY = 4  # rounds between decisions for an unchanged batch
_PLAN_PLAIN = 32  # the most between decisions that held to plain decoding, where little is learnt
_ALIKE = 4  # plain rounds between two decisions that are learnt from
_WARM_UP = 2  # rounds per arm when no costs are known
_WARM_TRIES = 8  # rounds a batch size may spend on first timings
_WARM_REACH = 4  # timings at one batch size serve up to this factor of it
_TRUSTED = 3  # rounds of an arm before its measured loss keeps it from being probed
_NOISE = 1.2  # times its expected time, a round has taken no longer than usual
_ADMISSIONS = 4  # groups of requests whose prompts' cost to the drafter is remembered
_STEEP = 1.75  # times a plain step: a round of gamma 1 beyond this makes long drafts hopeless


class _Round(NamedTuple):
    """A finished round, kept until something is to be decided."""

    gamma: int
    batch: int
    context: int
    probed: bool
    caught_up: bool  # after plain rounds the drafter first caught up on the tokens it missed
    drafted: Counts
    accepted: Counts
    seconds: float
    draft_seconds: float


class AutoGamma:
    """Goodput-maximising draft length per batch size, gamma 0 included.

    Args:
        max_gamma: longest draft considered.
        costs: seconds of a round, ``(batch, gamma, context)``, of a fitted model
            (``profile.Profile.round_cost``).
        acceptance_prior: acceptance rate assumed before the first round.
    """

    def __init__(
        self,
        max_gamma: int = DEFAULT_MAX_GAMMA,
        *,
        costs: RoundCost | None = None,
        acceptance_prior: float = 0.6,
    ) -> None:
        if max_gamma < 1:
            raise ValueError(f"max_gamma must be at least 1, got {max_gamma}")
        self.max_gamma = max_gamma
        self.acceptance = AcceptanceEstimator(max_gamma, acceptance_prior)
        self._costs: CorrectedCost | LearnedCost = (
            LearnedCost() if costs is None else CorrectedCost(costs)
        )
        self._warming = 0
        self._anchor = costs is not None  # a model's idea of plain decoding needs checking
        self._current = 0
        self._goodputs: list[float] = []
        self._planned_for: int | None = None
        self._plan_after = _PLAN_EVERY
        self._rounds_since_plan = 0
        self._rounds: list[_Round] = []  # not learnt from yet
        self._context = 0
        self._asked = self._asked_before = 0
        self._warm_tries: dict[int, int] = {}
        self._probe = Probe(0, 1, 0.0, 0.0)
        self._probe_left = 0
        self._probing = False  # the round asked for last is a probe
        self._budget = ProbeBudget()
        # By whether the drafter was at work: its seconds for prompts, per token of their outputs.
        self._prompt_costs = {idle: deque[float](maxlen=_ADMISSIONS) for idle in (True, False)}
        self._reason = "no round has run yet"

    def use_costs(self, costs: RoundCost) -> None:
        """Start from costs measured here, such as a start-up profile; rounds go on correcting them.

        Unlike costs given at construction they are trusted about plain decoding, too.
        """
        self._costs = CorrectedCost(costs)
        self._anchor = False
        self._planned_for = None

    def choose(self, live_batch: int, context: int) -> int:
        """Draft length of the next round for ``live_batch`` rows of about ``context`` tokens."""
        self._context = context
        self._asked_before, self._asked = self._asked, self._decide(live_batch)
        return self._asked

    def _decide(self, live_batch: int) -> int:
        self._probing = self._probe_left > 0
        if self._probing:
            self._probe_left -= 1
            return self._probe.gamma
        if live_batch == self._planned_for and self._rounds_since_plan < self._plan_after:
            self._rounds_since_plan += 1
            return self._current
        self._learn()
        self._planned_for = None
        if live_batch < 1:
            return 0
        if isinstance(self._costs, LearnedCost):
            arm = self._warm_up_arm(self._costs, live_batch)
            # A drafter with nothing to offer never fills the arm asked for: ask only so often.
            tries = self._warm_tries.get(bucket_of(live_batch), 0)
            if arm is not None and tries < _WARM_TRIES:
                self._warm_tries[bucket_of(live_batch)] = tries + 1
                self._reason = f"gamma {arm}: first timings at batch {live_batch}"
                return arm
        self._plan(live_batch)
        if self._budget.allows(self._probe, self._context):
            self._probing, self._probe_left = True, self._probe.rounds - 1
            return self._probe.gamma  # what it shows is looked at as soon as it is over
        self._planned_for, self._rounds_since_plan = live_batch, 1
        return self._current

    def observe(
        self, gamma: int, batch: int, drafted: Counts, accepted: Counts, times: Times
    ) -> None:
        """Take note of one finished round.

        Args:
            drafted: valid drafts per row; accepted: accepted drafts per row.
            times: phase -> seconds; their sum is the round, unless ``"total"`` is given.
        """
        caught_up = gamma > 0 and self._asked_before == 0
        seconds = times.get("total", 0.0) or sum(times.values())
        situation = gamma, batch, self._context, self._probing, caught_up
        measured = drafted, accepted, seconds, times.get("draft", 0.0)
        self._rounds.append(_Round(*situation, *measured))

    def admitted(self, tokens: float, seconds: float) -> None:
        """Take note of new requests.

        Args:
            tokens: that they are expected to emit.
            seconds: that the drafter spent on their prompts. What it does not spend while it idles
                is a cost of drafting, and weighs most where outputs are short.
        """
        self._prompt_costs[self._asked == 0].append(seconds / max(tokens, 1.0))

    def _learn(self) -> None:
        early, last = self._rounds[:-_ALIKE], self._rounds[-_ALIKE:]
        plain = [r for r in early if r.gamma == 0]
        for r in plain:  # of many, the last few say it all
            self._budget.spend(0, r.seconds)
        self.acceptance.idle(len(plain))
        for r in [r for r in early if r.gamma] + last:
            self.acceptance.update(r.gamma, r.drafted, r.accepted)
            known = self._costs.observations(r.batch, r.gamma)
            # Catching up is not this arm's lasting cost, but what a probe costs all the same.
            if r.caught_up and known:
                expected = self._costs.seconds(r.batch, r.gamma, r.context)
                self._budget.observe_catch_up(r.seconds - _NOISE * expected, r.context)
            else:
                self._costs.observe(r.batch, r.gamma, r.context, r.seconds, r.draft_seconds)
            self._budget.spend(r.gamma, r.seconds)
            if r.probed:
                emitted = r.batch + sum(r.accepted)
                self._budget.charge(r.seconds, emitted / self._goodputs[self._current])
        self._rounds.clear()

    def explain(self) -> str:
        """Why the current draft length was chosen, in one line."""
        return self._reason

    def _predicted(self, batch: int, context: int) -> list[float]:
        """Tokens per second of the whole batch for gamma = 0..max_gamma."""
        tokens = self.acceptance.expected_tokens()
        seconds = [self._costs.seconds(batch, gamma, context) for gamma in range(len(tokens))]
        idle, drafting = (median_low(self._prompt_costs[key] or (0.0,)) for key in (True, False))
        upkeep = batch * max(drafting - idle, 0.0)
        seconds[1:] = [s + upkeep * n for s, n in zip(seconds[1:], tokens[1:], strict=True)]
        # A longer draft cannot be cheaper: where it seems so, the shorter one's rounds stalled.
        least = list(accumulate(reversed(seconds), min))[::-1]
        return [batch * n / s for n, s in zip(tokens, least, strict=True)]

    def _plan(self, batch: int) -> None:
        goodputs = self._goodputs = self._predicted(batch, self._context)
        best = max(range(len(goodputs)), key=goodputs.__getitem__)
        gain = goodputs[best] / goodputs[self._current] - 1.0
        # Falling back to plain decoding needs no margin: it is the safe choice.
        threshold = 0.0 if best == 0 else _SWITCH_GAIN if self._current else _LEAVE_GAIN
        held = gain <= threshold
        if not held:
            self._current = best
        patient = held and best == 0
        self._plan_after = min(2 * self._plan_after, _PLAN_PLAIN) if patient else _PLAN_EVERY
        self._probe = self._plan_probe(batch)
        plain, chosen = goodputs[0], goodputs[self._current]
        rates = ", ".join(f"{rate:.2f}" for rate in self.acceptance.conditional()[:4])
        self._reason = (
            f"gamma {self._current} at batch {batch}: {chosen:.4g} tok/s predicted, "
            f"{chosen / plain:.2f}x plain decoding; acceptance by position {rates}; "
            f"best alternative gamma {best} {goodputs[best] / chosen - 1.0:+.1%}; "
            f"probing lost {self._budget.lost_share:.2%}"
        )

    def _warm_up_arm(self, costs: LearnedCost, batch: int) -> int | None:
        """The next gamma to time when rounds of its size were never run; None when none is needed.

        gamma 0 and 1 give the slope. A longer draft is timed too unless gamma 1 already costs so
        much that it would lose several plain steps for nothing.
        """
        if costs.observations(batch, 0) < _WARM_UP and not costs.knows_verify(batch, _WARM_REACH):
            self._warming = batch
        if self._warming == batch and costs.observations(batch, 0) < _WARM_UP:
            return 0
        if not costs.knows_draft() or (
            self._warming == batch and 0 < costs.observations(batch, 1) < _WARM_UP
        ):
            return 1
        steep = costs.seconds(batch, 1, 0) > _STEEP * costs.seconds(batch, 0, 0)
        longest = self._plausible_gamma()
        known = costs.knows_verify(batch * (longest + 1), _WARM_REACH / 2)
        return None if steep or known else longest

    def _plausible_gamma(self) -> int:
        """The draft length that a third of the rows would survive, at least 2."""
        rate = min(max(self.acceptance.conditional()[0], 0.01), 0.99)
        return min(max(round(math.log(1 / 3) / math.log(rate)), 2), self.max_gamma)

    def _plan_probe(self, batch: int) -> Probe:
        """The arm whose next probe is worth most, and what it is expected to cost."""
        arm = self._arm_to_probe(batch, self._goodputs)
        rounds = 1 if batch >= 8 or arm == 0 else 2
        plain = self._costs.seconds(batch, 0, self._context)
        seconds = rounds * self._costs.seconds(batch, arm, self._context)
        promise = min(self._goodputs[arm] / self._goodputs[self._current], 1.0)
        loss = seconds * (1.0 - promise)
        if self._costs.observations(batch, arm) < _TRUSTED:
            # one stalled round may be all that speaks against this arm
            promise = 1.0
            loss = min(
                loss, rounds * min(plain, self._costs.seconds(batch, self._current, self._context))
            )
        return Probe(arm, rounds, loss, (2.0 if self._anchor else _PROBE_CREDIT) * plain, promise)

    def _arm_to_probe(self, batch: int, goodputs: list[float]) -> int:
        """Plain decoding until it is known; from there the best speculative arm, from a
        speculative arm its least known neighbour."""
        others = [gamma for gamma in range(len(goodputs)) if gamma != self._current]
        if self._anchor and self._current:
            if self._costs.observations(batch, 0) < _TRUSTED:
                return 0  # "never slower than plain" needs to know what plain costs
            self._anchor = False
        if self._current == 0:
            return max(others, key=goodputs.__getitem__)
        near = [g for g in others if g == 0 or abs(g - self._current) <= 2]
        return min(near, key=lambda g: (self._costs.observations(batch, g), -goodputs[g]))

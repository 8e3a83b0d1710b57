"""Chooses the draft length of every round: the one that emits most tokens per second.

``goodput(gamma) = batch * E[tokens emitted per row | gamma] / seconds(batch, gamma, context)``.
Tokens come from a running estimate of acceptance per draft position (``acceptance.py``), seconds
from a profile corrected by the rounds actually run (``step_cost.py``) or, without one, from those
rounds alone (``learned_cost.py``). ``gamma = 0`` (plain autoregressive decoding) is one of the
choices ("arms", as of a bandit), so that a bad drafter, batch size or machine ends in ordinary
decoding, not in a slowdown. Arms other than the one held best are tried from a budget of at most
0.5 % of the time (``probing.py``).

A decision holds for several rounds, and until the next a round costs the controller next to
nothing: rounds are kept as they come and learnt from when a decision is due.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

from .acceptance import AcceptanceEstimator
from .base import DEFAULT_MAX_GAMMA, Counts, Times
from .learned_cost import LearnedCost
from .probing import Probe, ProbeBudget
from .prompt_costs import PromptCosts
from .step_cost import CorrectedCost, RoundCost, bucket_of

_SWITCH_GAIN = 0.02  # relative goodput that another gamma must add: less could be noise
# The same for leaving plain decoding, in which the drafter falls behind: each return costs it a
# catch-up on the tokens it missed.
_LEAVE_GAIN = 0.04
_PROBE_CREDIT = 0.3  # plain steps' worth of time that probes may lose before the budget has grown
_CHECK_CREDIT = 2.0  # the same for checking a forecast of plain decoding
_HOLD = 4  # rounds that a decision holds while the batch does not change
_HOLD_PLAIN = 32  # the most, doubling, where plain decoding is confirmed: it teaches little
_LEARNT_PLAIN = 4  # of the plain rounds between two decisions, how many are learnt from: the last
_WARM_UP = 2  # rounds per arm when no costs are known
_WARM_TRIES = 8  # rounds a batch size may spend on first timings
_WARM_REACH = 4  # a verification counts as timed if one within this factor of its tokens was
_TRUSTED = 3  # rounds of an arm from which its measured loss is believed
_NOISE = 1.2  # a round within this factor of its expected time has taken no longer than usual
_STEEP = 1.75  # if a round of gamma 1 takes more plain steps than this, long drafts are hopeless


class _Round(NamedTuple):
    """A finished round, kept until something is to be decided."""

    gamma: int
    batch: int
    context: int
    probed: bool
    caught_up: bool  # the drafter first took in the tokens of the plain rounds before
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
        self._warming = 0  # the batch size whose first timings are being taken
        self._warm_tries: dict[int, int] = {}  # rounds spent on them, by bucket of batch sizes
        # A forecast of plain decoding is checked by a round of it before drafts are trusted.
        self._unchecked = costs is not None
        self._current = 0  # the draft length held best
        self._goodputs: list[float] = []  # by draft length, when that was decided
        self._decided_for: int | None = None  # live rows at the decision that holds; None is none
        self._hold = _HOLD  # rounds that it holds
        self._held = 0  # rounds that it has held
        self._rounds: list[_Round] = []  # not learnt from yet
        self._context = 0
        self._asked = self._asked_before = 0  # the draft lengths asked for last, and before that
        self._probe = Probe(0, 1, 0.0, 0.0)
        self._probe_left = 0
        self._probing = False  # the round asked for last is a probe
        self._budget = ProbeBudget()
        self._prompts = PromptCosts()
        self._reason = "no round has run yet"

    def use_costs(self, costs: RoundCost) -> None:
        """Start from costs measured here, such as a start-up profile; rounds go on correcting them.

        Costs given at construction are a forecast, which a round of plain decoding has to confirm
        before drafts are trusted; these were measured, plain decoding included.
        """
        self._costs = CorrectedCost(costs)
        self._unchecked = False
        self._decided_for = None

    def choose(self, live_batch: int, context: int) -> int:
        """Draft length of the next round for ``live_batch`` rows of about ``context`` tokens, of
        which 0 says that the drafter never has plain rounds to catch up on."""
        self._context = context
        self._asked_before, self._asked = self._asked, self._next_gamma(live_batch)
        return self._asked

    def _next_gamma(self, live_batch: int) -> int:
        """What a probe under way, the decision that holds, a first timing or a new decision say."""
        self._probing = self._probe_left > 0
        if self._probing:
            self._probe_left -= 1
            return self._probe.gamma
        if live_batch == self._decided_for and self._held < self._hold:
            self._held += 1
            return self._current
        self._learn()
        self._decided_for = None
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
        self._decide(live_batch)
        if self._budget.allows(self._probe, self._context):
            self._probing, self._probe_left = True, self._probe.rounds - 1
            return self._probe.gamma  # what it shows is looked at as soon as it is over
        self._decided_for, self._held = live_batch, 1
        return self._current

    def observe(
        self, gamma: int, batch: int, drafted: Counts, accepted: Counts, times: Times
    ) -> None:
        """Take note of one finished round.

        Args:
            gamma: draft length asked for.
            batch: live rows.
            drafted: valid drafts per row.
            accepted: accepted drafts per row.
            times: phase -> seconds; their sum is the round, unless ``"total"`` is given.
        """
        seconds = times.get("total", 0.0) or sum(times.values())
        self._rounds.append(
            _Round(
                gamma=gamma,
                batch=batch,
                context=self._context,
                probed=self._probing,
                caught_up=gamma > 0 and self._asked_before == 0 and self._context > 0,
                drafted=drafted,
                accepted=accepted,
                seconds=seconds,
                draft_seconds=times.get("draft", 0.0),
            )
        )

    def admitted(self, tokens: float, seconds: float, prompt_tokens: int) -> None:
        """Take note of new requests.

        Args:
            tokens: that they are expected to emit.
            seconds: that the drafter spent on their prompts.
            prompt_tokens: of these.
        """
        self._prompts.add(self._asked == 0, prompt_tokens, tokens, seconds)

    def _learn(self) -> None:
        """Give the rounds since the last decision to the estimates and to the budget."""
        early, last = self._rounds[:-_LEARNT_PLAIN], self._rounds[-_LEARNT_PLAIN:]
        plain = [r for r in early if r.gamma == 0]
        for r in plain:  # of many alike, the last few say it all
            self._budget.spend(0, r.seconds)
        self.acceptance.idle(len(plain))
        for r in [r for r in early if r.gamma] + last:
            self.acceptance.update(r.gamma, r.drafted, r.accepted)
            known = self._costs.observations(r.batch, r.gamma)
            # Catching up is no lasting cost of this arm, but a probe of it has to pay for it.
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
        prompts = batch * self._prompts.per_token()  # seconds per token that a row emits
        seconds[1:] = [s + prompts * n for s, n in zip(seconds[1:], tokens[1:], strict=True)]
        # A longer draft cannot be cheaper: where it seems so, the shorter one's rounds stalled.
        least = list(accumulate(reversed(seconds), min))[::-1]
        return [batch * n / s for n, s in zip(tokens, least, strict=True)]

    def _decide(self, batch: int) -> None:
        """Hold to the current draft length or take a better one; choose what to probe next."""
        goodputs = self._goodputs = self._predicted(batch, self._context)
        best = max(range(len(goodputs)), key=goodputs.__getitem__)
        gain = goodputs[best] / goodputs[self._current] - 1.0
        # Falling back to plain decoding needs no margin: it is the safe choice.
        threshold = 0.0 if best == 0 else _SWITCH_GAIN if self._current else _LEAVE_GAIN
        better = gain > threshold
        if better:
            self._current = best
        plain_confirmed = best == 0 and not better
        self._hold = min(2 * self._hold, _HOLD_PLAIN) if plain_confirmed else _HOLD
        self._probe = self._choose_probe(batch)
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

    def _choose_probe(self, batch: int) -> Probe:
        """The arm whose next probe is worth most, and what it is expected to cost."""
        arm = self._arm_to_probe(batch, self._goodputs)
        rounds = 1 if batch >= 8 or arm == 0 else 2
        plain, current, probed = (
            self._costs.seconds(batch, gamma, self._context) for gamma in (0, self._current, arm)
        )
        promise = min(self._goodputs[arm] / self._goodputs[self._current], 1.0)
        loss = rounds * probed * (1.0 - promise)
        if self._costs.observations(batch, arm) < _TRUSTED:
            # One stalled round may be all that speaks against this arm.
            promise = 1.0
            loss = min(loss, rounds * min(plain, current))
        credit = (_CHECK_CREDIT if self._unchecked else _PROBE_CREDIT) * plain
        return Probe(arm, rounds, loss, credit, promise)

    def _arm_to_probe(self, batch: int, goodputs: list[float]) -> int:
        """Plain decoding while it is only forecast; then, from plain decoding, the best draft
        length, and from a draft length the least known of its neighbours and plain decoding."""
        others = [gamma for gamma in range(len(goodputs)) if gamma != self._current]
        if self._unchecked and self._current:
            if self._costs.observations(batch, 0) < _TRUSTED:
                return 0  # "never slower than plain" needs to know what plain costs
            self._unchecked = False
        if self._current == 0:
            return max(others, key=goodputs.__getitem__)
        near = [g for g in others if g == 0 or abs(g - self._current) <= 2]
        return min(near, key=lambda g: (self._costs.observations(batch, g), -goodputs[g]))

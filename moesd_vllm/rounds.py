"""A draft-length controller driven by the steps of an engine that drafts after it verifies.

A controller thinks in rounds: draft, then verify. A step of vLLM verifies what the step before has
drafted, and then drafts for the next, so that two lengths take part in its time where the length
changes. Hence a length asked for is kept until one step has verified and drafted that many tokens;
that step is reported as the round, and only then is the controller asked again. The steps at a
change have their use, too: beside a neighbour that verified as much they tell what drafting takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import NamedTuple

from decoder.gamma.base import Controller, Counts
from decoder.gamma.step_cost import bucket_of, typical

# Tokens that a drafter may have to catch up on after steps without drafts. vLLM's never has to: a
# draft model reads every token in steps that draft none, too, and look-up in a text keeps nothing.
_CONTEXT = 0
_WINDOW = 9  # timings of drafting kept
_LEAST = 1e-6  # seconds of drafting a token, where noise says that it takes none
_MOST = 0.9  # of a step at most goes into drafting


class _Step(NamedTuple):
    """A step that was scheduled: tokens per sequence that it verifies, and that it drafts."""

    verified: int
    drafted: int


class _Timed(NamedTuple):
    """A step that has ended."""

    step: _Step
    batch: int
    seconds: float


class StepGamma:
    """Answers with the draft length of a step, and learns from the steps that have ended.

    Args:
        controller: who chooses.
        lengths: draft lengths that may be chosen; what the controller asks for is rounded down to
            one of them, or up to the shortest.
    """

    def __init__(self, controller: Controller, lengths: Collection[int]) -> None:
        if not lengths or min(lengths) < 0:
            raise ValueError(f"lengths must be draft lengths of at least 0, got {list(lengths)}")
        self.controller = controller
        self._lengths = sorted(lengths)
        self._length = 0  # that the step scheduled last has drafted
        self._asked = False  # whether a length is asked for whose round has not ended
        self._steps: deque[_Step] = deque()  # scheduled and not ended
        self._before: _Timed | None = None  # the step before, where it can be compared with
        # Seconds of drafting one more token, by bucket of batch sizes.
        self._drafting: dict[int, deque[float]] = {}

    def __getitem__(self, batch: int) -> int:
        """Tokens to draft per sequence at the end of the step that is being scheduled.

        It is vLLM's ``dynamic_sd_lookup``, which is looked into once for every step.

        Args:
            batch: sequences in the step, those reading their prompt included.
        """
        verified = self._length
        if not self._asked:
            asked = self.controller.choose(batch, _CONTEXT)
            self._length = max((n for n in self._lengths if n <= asked), default=self._lengths[0])
            self._asked = True
        self._steps.append(_Step(verified, self._length))
        return self._length

    def ended(self, seconds: float, drafted: Counts, accepted: Counts) -> None:
        """Take note of the end of the oldest step that was looked up.

        Args:
            seconds: from the end of the step before to its own.
            drafted: tokens verified, per sequence; accepted: how many of them.
        """
        step, batch = self._steps.popleft(), len(drafted)
        self._compare(_Timed(step, batch, seconds))
        if self._asked and step == (self._length, self._length):
            token = typical(self._drafting.get(bucket_of(batch)) or (0.0,))
            times = {"total": seconds, "draft": min(step.drafted * token, _MOST * seconds)}
            self.controller.observe(step.verified, batch, drafted, accepted, times)
            self._asked = False

    def ended_otherwise(self) -> None:
        """The same of a step that is none of a round: it read prompts, or followed a pause."""
        self._steps.popleft()
        self._before = None

    def _compare(self, now: _Timed) -> None:
        """Learn what drafting takes from two steps in a row that differ in that alone."""
        before, self._before = self._before, now
        if before is None or before.batch != now.batch:
            return
        more = now.step.drafted - before.step.drafted
        if now.step.verified == before.step.verified and more:
            token = max((now.seconds - before.seconds) / more, _LEAST)
            bucket = self._drafting.setdefault(bucket_of(now.batch), deque(maxlen=_WINDOW))
            bucket.append(token)

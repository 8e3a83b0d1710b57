"""The controller behind an engine that drafts after it verifies: what it is asked, what it sees."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from decoder.gamma.auto import AutoGamma
from moesd_vllm.rounds import StepGamma


class Script:
    """A controller that asks for given lengths in turn and writes down what it is told."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = itertools.chain(lengths, itertools.repeat(lengths[-1]))
        self.asked: list[int] = []  # batches
        self.rounds: list[tuple] = []

    def choose(self, live_batch: int, context: int) -> int:
        assert context == 0  # vLLM's drafters have nothing to catch up on
        self.asked.append(live_batch)
        return next(self.lengths)

    def observe(self, gamma, batch, drafted, accepted, times) -> None:
        self.rounds.append((gamma, batch, drafted, accepted, times))

    def admitted(self, tokens: float, seconds: float, prompt_tokens: int) -> None:
        raise AssertionError("what a drafter spends on prompts is not seen in vLLM")

    def explain(self) -> str:
        return "as scripted"


def run(steps: StepGamma, batch: int, count: int, ahead: int = 0) -> list[tuple[int, int]]:
    """Run steps of 1 s + 0.25 s per token drafted, and list what each verifies and drafts."""
    done, length = [], 0
    queue: list[tuple[int, int]] = []
    for _ in range(count):
        queue.append((length, steps[batch]))
        length = queue[-1][1]
        if len(queue) > ahead:
            step = queue.pop(0)
            done.append(step)
            steps.ended(1 + 0.25 * step[1], [step[0]] * batch, [0] * batch)
    return done


def test_a_step_that_verifies_and_drafts_as_many_is_the_round() -> None:
    script = Script(0, 2, 2, 1)
    steps = StepGamma(script, range(5))
    assert run(steps, 3, 6) == [(0, 0), (0, 2), (2, 2), (2, 2), (2, 1), (1, 1)]
    assert [(gamma, batch) for gamma, batch, *_ in script.rounds] == [
        (0, 3),
        (2, 3),
        (2, 3),
        (1, 3),
    ]
    assert [times["total"] for *_, times in script.rounds] == [1, 1.5, 1.5, 1.25]
    # From (0, 0) and (0, 2), and from (2, 2) and (2, 1): a quarter of a second a token.
    assert [times["draft"] for *_, times in script.rounds] == [0, 0.5, 0.5, 0.25]


def test_a_scheduler_ahead_asks_only_after_the_round_has_ended() -> None:
    script = Script(0, 2, 1)
    steps = StepGamma(script, range(5))
    done = run(steps, 1, 12, ahead=1)
    assert len(script.asked) <= len(script.rounds) + 1
    assert [gamma for gamma, *_ in script.rounds][:3] == [0, 2, 1]
    for gamma, _, _, _, times in script.rounds:
        assert times["total"] == 1 + 0.25 * gamma  # never that of a step at a change
    assert (0, 2) in done and (2, 1) in done


def test_steps_with_prompts_are_no_rounds_and_no_neighbours() -> None:
    script = Script(0, 3)
    steps = StepGamma(script, range(5))
    assert steps[2] == 0
    steps.ended_otherwise()
    assert script.rounds == [] and script.asked == [2]
    assert run(steps, 2, 1) == [(0, 0)]
    assert steps[2] == 3 and len(script.rounds) == 1
    steps.ended_otherwise()  # it would have shown what drafting takes
    assert run(steps, 2, 1)[0][1] == 3
    assert script.rounds[-1][0] == 3 and script.rounds[-1][4]["draft"] == 0


@pytest.mark.parametrize(
    ("lengths", "asked", "got"),
    [
        (range(5), 3, 3),
        ([0, 2, 4], 3, 2),
        ([4, 0, 2], 1, 0),
        ([2, 4], 0, 2),
        ([3], 8, 3),
    ],
    ids=str,
)
def test_a_length_that_may_not_be_chosen_becomes_one_that_may(lengths, asked, got) -> None:
    steps = StepGamma(Script(asked), lengths)
    assert steps[1] == got


@pytest.mark.parametrize("lengths", [[], [-1, 2]], ids=str)
def test_lengths_must_be_draft_lengths(lengths) -> None:
    with pytest.raises(ValueError, match="lengths must be draft lengths of at least 0"):
        StepGamma(Script(0), lengths)


@pytest.mark.parametrize(
    ("seconds", "draft"),
    [((1.0, 0.5, 1.0), 2e-6), ((1.0, 9.0, 1.0), 0.9)],
    ids=["drafts seem to save time", "a stall"],
)
def test_what_noise_says_of_drafting_has_bounds(seconds, draft) -> None:
    script = Script(0, 2)
    steps = StepGamma(script, range(5))
    for each in seconds:  # (0, 0), (0, 2), (2, 2)
        assert steps[1] in (0, 2)
        steps.ended(each, [0], [0])
    gamma, *_, times = script.rounds[-1]
    assert gamma == 2 and times == {"total": 1.0, "draft": pytest.approx(draft)}


def engine(
    alpha: Callable[[int], float], draft: float, tokens: float, rows: int = 4, count: int = 1500
) -> tuple[Counter, float]:
    """Lengths that ``AutoGamma`` has vLLM's steps draft, and tokens per second over the run.

    Args:
        alpha: step -> acceptance.
        draft: seconds of drafting a token; tokens: of verifying one beyond the first.
    """
    draws = random.Random(0)
    steps = StepGamma(AutoGamma(4), range(5))
    length, seconds, emitted, chosen = 0, 0.0, 0, Counter()
    for number in range(count):
        before, length = length, steps[rows]
        took = 1.0 + tokens * rows * before + draft * length
        took *= draws.uniform(0.97, 1.03)
        accepted = []
        for _ in range(rows):
            kept = 0
            while kept < before and draws.random() < alpha(number):
                kept += 1
            accepted.append(kept)
        steps.ended(took, [before] * rows, accepted)
        seconds, emitted = seconds + took, emitted + rows + sum(accepted)
        chosen[length] += 1
    return chosen, emitted / seconds


def best_fixed(alpha: float, draft: float, tokens: float, rows: int = 4) -> tuple[int, float]:
    """The best length by its formula, and its tokens per second."""
    rates = {}
    for gamma in range(5):
        emitted = rows * sum(alpha**n for n in range(gamma + 1))
        rates[gamma] = emitted / (1.0 + tokens * rows * gamma + draft * gamma)
    best = max(rates, key=rates.__getitem__)
    return best, rates[best]


@pytest.mark.parametrize(
    ("alpha", "draft", "tokens"),
    [(0.9, 0.02, 0.005), (0.1, 0.2, 0.05), (0.6, 0.15, 0.01)],
    ids=["long drafts pay", "none pay", "short ones pay"],
)
def test_the_best_length_is_found_in_vllms_steps(alpha, draft, tokens) -> None:
    best, rate = best_fixed(alpha, draft, tokens)
    chosen, reached = engine(lambda _: alpha, draft, tokens)
    assert max(chosen, key=chosen.__getitem__) in (best - 1, best, best + 1)
    assert (best == 0) == (max(chosen, key=chosen.__getitem__) == 0)
    assert reached >= 0.97 * rate


def test_acceptance_that_changes_is_followed() -> None:
    changing = lambda number: 0.9 if number % 400 < 200 else 0.05
    _, reached = engine(changing, 0.1, 0.02, count=1200)
    fixed = []
    for gamma in range(5):
        seconds = 1.0 + 0.02 * 4 * gamma + 0.1 * gamma
        emitted = [4 * sum(alpha**n for n in range(gamma + 1)) for alpha in (0.9, 0.05)]
        fixed.append(sum(emitted) / (2 * seconds))
    assert reached > max(fixed)

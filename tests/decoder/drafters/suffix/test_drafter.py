"""Proposals against a search of all sequences, who looks in which, and what they are worth."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.faults import Case, trap
from support.tiny import tiny_moe

from decoder import SamplingParams, SpeculativeDecoder, embedded
from decoder.cli.compare import compare
from decoder.drafters import SuffixDrafter
from decoder.drafters.base import forget_finished
from decoder.drafters.suffix import index
from decoder.embedded.prompts import CODE_PROMPTS
from decoder.model.loading import load_model, load_tokenizer
from decoder.round import StepState, Verdict

torch.set_num_threads(1)

WIDTH = 80


class Script:
    """Plays the engine's part: texts grow by random tokens, whatever is proposed.

    Attributes:
        texts: of the live rows.
        finished: the others, in order.
    """

    def __init__(self, drafter: SuffixDrafter, greedy: bool = True, verifier: str = "standard"):
        self.drafter, self.texts, self.finished = drafter, dict[int, list[int]](), list[list[int]]()
        sampler: Any = SimpleNamespace(verifier=verifier, all_greedy=lambda rows: greedy)
        drafter.bind(None, sampler, 8)  # type: ignore[arg-type]
        self.tokens = torch.zeros(4, WIDTH, dtype=torch.int64)

    def admit(self, row: int, prompt: list[int], first: int) -> None:
        self.drafter.admit(
            torch.tensor([row]), torch.tensor([[*prompt, 0]]), torch.tensor([len(prompt)]), None
        )
        self.write(row, [*prompt, first])

    def write(self, row: int, text: list[int]) -> None:
        self.texts[row] = text
        self.tokens[row, : len(text)] = torch.tensor(text)

    def state(self) -> StepState:
        rows = torch.tensor(list(self.texts))
        lengths = torch.tensor([len(text) - 1 for text in self.texts.values()])
        current, previous = self.tokens[rows, lengths], self.tokens[rows, lengths - 1]
        return StepState(rows, lengths, current, previous, self.tokens, lengths.tolist())

    def propose(self, gamma: int = 5) -> list[list[int]]:
        draft = self.drafter.propose(self.state(), gamma)
        assert draft.probs is None and draft.gamma == gamma
        proposed = zip(draft.tokens.tolist(), draft.lengths.tolist(), strict=True)
        return [tokens[:length] for tokens, length in proposed]

    def commit(self, emitted: list[list[int]], told: bool = True) -> None:
        width = max(map(len, emitted))
        padded = torch.tensor([new + [-1] * (width - len(new)) for new in emitted])
        accepted = torch.tensor([len(new) - 1 for new in emitted])
        if told:
            self.drafter.commit(self.state(), Verdict(accepted, padded), None)
        for row, new in zip(list(self.texts), emitted, strict=True):
            self.write(row, self.texts[row] + new)

    def release(self, row: int) -> None:
        self.drafter.release([row])
        self.finished.append(self.texts.pop(row))


def check(
    path: list[int], own: list[int], others: list[list[int]], gamma: int, drafter: SuffixDrafter
) -> None:
    """The path is a likeliest one, as long as it may be, by counting in all texts."""
    known = [(text, end) for text in (own, *others) for end in range(1, len(text))]
    depth = drafter.max_tree_depth

    def matched(text: list[int], end: int) -> int:
        suffixes = range(min(depth, end, len(own)), 0, -1)
        return next((n for n in suffixes if text[end - n : end] == own[-n:]), 0)

    most = max((matched(*place) for place in known), default=0)
    places = [place for place in known if most and matched(*place) == most]
    limit, prob = min(gamma, int(drafter.max_spec_factor * most)), 1.0
    for step in range(limit):
        follow = Counter[int]()
        after: list[tuple[list[int], int, int]] = []
        for text, end in places:
            whole = text + path if text is own else text
            # Not the token that is being checked: a text's own path ends before it.
            if end + step < len(text) + (step if text is own else 0):
                follow[whole[end + step]] += 1
                after.append((text, end, whole[end + step]))
        best = max(follow.values(), default=0)
        prob *= best / max(follow.total(), 1)
        if not best or prob < drafter.min_token_prob:
            assert len(path) == step
            return
        assert len(path) > step and follow[path[step]] == best
        places = [(text, end) for text, end, token in after if token == path[step]]
    assert len(path) == limit


@pytest.mark.parametrize("seed", range(24))
def test_proposals_are_the_likeliest_by_count(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come and go; some calls fail, and the row is then read again."""
    monkeypatch.setattr(index, "_MOST_STEPS", 10**6)
    monkeypatch.setattr(index, "MOST_PLACES", 10**6)
    rng = random.Random(seed)
    drafter = SuffixDrafter(
        rng.choice([1, 3, 24]), 100, rng.choice([0.5, 1.0, 3.0]), rng.choice([0.0, 0.1, 0.6])
    )
    greedy, verifier = seed % 3 > 0, rng.choice(["standard", "block", "coupled"])
    script = Script(drafter, greedy, verifier)
    shared = greedy or verifier == "coupled"
    alphabet = rng.choice([2, 3, 6])
    draw, told = lambda count: [rng.randrange(alphabet) for _ in range(count)], True
    for _ in range(25):
        for row in range(3):
            if row not in script.texts and rng.random() < 0.5:
                script.admit(row, draw(rng.randrange(1, 12)), draw(1)[0])
            elif row in script.texts and told and rng.random() < 0.1:
                script.release(row)
        if not script.texts:
            continue
        if rng.random() < 0.8:  # the others are rounds of plain decoding
            live = list(script.texts.values())
            for own, path in zip(live, script.propose(), strict=True):
                others = [text for text in live if text is not own] + script.finished
                check(path, own, others if shared else [], 5, drafter)
        told = rng.random() < 0.9
        script.commit([draw(rng.randrange(1, 4)) for _ in script.texts], told)


@pytest.mark.parametrize(
    ("greedy", "verifier", "requests", "shared"),
    [
        (True, "standard", 9, True),
        (False, "coupled", 9, True),
        (False, "standard", 9, False),
        (False, "block", 9, False),
        (True, "standard", 0, False),
    ],
)
def test_who_looks_in_other_texts(greedy: bool, verifier: str, requests: int, shared: bool) -> None:
    script = Script(SuffixDrafter(max_cached_requests=requests), greedy, verifier)
    script.admit(0, [1, 2, 3, 4], 5)
    script.admit(1, [8, 2, 3], 4)
    assert script.propose() == [[], [5] if shared else []]
    script.commit([[6], [7]])
    script.release(0)
    script.admit(0, [9, 3, 4], 5)
    assert script.propose()[1] == ([6] if shared else [])


def test_what_finished_is_kept_to_its_limit() -> None:
    script = Script(SuffixDrafter(max_cached_tokens=20))
    for first in range(8):
        script.admit(0, [10 + first, 20 + first, 30 + first], 40 + first)
        script.commit([[50 + first]])
        script.release(0)
    texts = [tokens for tokens, _ in script.drafter._shared._texts.values()]
    assert sum(map(len, texts)) == 20 and not script.drafter._rows
    script.admit(0, [1], 13)
    script.admit(1, [1], 17)
    assert script.propose() == [[], [27]]


def test_finished_sequences_are_forgotten_when_told() -> None:
    script = Script(SuffixDrafter())
    for row, first in ((0, 10), (1, 20)):
        script.admit(row, [first, first + 1, first + 2], first + 3)
    script.propose()  # reads what the rows have so far
    script.release(0)
    forget_finished(script.drafter)
    script.admit(0, [9], 11)
    script.admit(2, [9], 21)
    assert script.propose() == [[], [], [22]]


def test_a_comparison_that_repeats_itself_is_not_answered_by_heart() -> None:
    target, prompts = tiny_moe(), [[3, 5, 7, 9], [8, 6, 4, 2]]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    once, repeated, plain = (
        SpeculativeDecoder(target, drafter, 3, max_batch_size=2, kernels=False)
        for drafter in (SuffixDrafter(), SuffixDrafter(), None)
    )
    once.generate(prompts, params)
    requests = [repeated.reader.read(i, prompt, params) for i, prompt in enumerate(prompts)]
    found = compare(plain, repeated, requests, repetitions=3).speculative_stats
    assert (found.drafted, found.accepted) == (once.stats.drafted, once.stats.accepted)
    once.generate(prompts, params)
    assert once.stats.accepted > found.accepted


@pytest.mark.parametrize(
    "option",
    [
        {"max_tree_depth": 0},
        {"max_cached_requests": -1},
        {"max_spec_factor": -0.5},
        {"max_spec_factor": float("nan")},
        {"min_token_prob": 1.5},
        {"max_cached_tokens": -1},
    ],
)
def test_refuses_numbers_out_of_range(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=rf"{name} must be in \[.*\], got {value}"):
        SuffixDrafter(**option)


def test_an_endless_factor_asks_for_no_more_than_gamma() -> None:
    script = Script(SuffixDrafter(max_spec_factor=float("inf")))
    script.admit(0, [1, 2, 3, 4, 5], 1)
    script.admit(1, [7], 8)
    assert script.propose(3) == [[2, 3, 4], []]


@pytest.mark.parametrize("point", ["admit", "propose", "commit", "release"])
def test_a_drafter_that_fails_costs_drafts_only(point: str) -> None:
    case = Case(tiny_moe(), "suffix", False)
    with trap(case.engine, f"drafter.{point}", lambda *_: True, 10**9) as fired:
        outputs = case.outputs()
    assert fired[0]
    case.check_others(outputs, None, point, drafted=False)
    case.check_others(case.outputs(), None, "afterwards", drafted=False)
    assert case.engine.stats.accepted > 0 and not case.engine.drafter._rows


def test_a_cancelled_request_is_text_like_any_other() -> None:
    engine = SpeculativeDecoder(tiny_moe(), SuffixDrafter(), 3, max_batch_size=2, kernels=False)
    asked = [engine.add([3, 5, 7, 9], SamplingParams(max_new_tokens=9)) for _ in range(2)]
    for _ in range(3):
        engine.step()
    output = engine.cancel(asked[0])
    assert output is not None and output.finish_reason == "cancelled"
    drafter: Any = engine.drafter
    assert list(drafter._rows) == [1]
    text = [3, 5, 7, 9, *output.token_ids]
    assert text in [list(tokens) for tokens, _ in drafter._shared._texts.values()]
    while not engine.is_idle():
        engine.step()
    assert drafter._rows == {}


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    path = embedded.target_path()
    return load_model(path), load_tokenizer(path)


@pytest.mark.parametrize(("temperature", "verifier"), [(0.0, "standard"), (0.8, "coupled")])
def test_a_prompt_asked_again_is_answered_by_heart(
    pair: Any, temperature: float, verifier: str
) -> None:
    """The outputs are the target's own both times."""
    target, tokenizer = pair
    params = SamplingParams(temperature=temperature, seed=3, max_new_tokens=32, ignore_eos=True)
    outputs, emitted = [], []
    for drafter in (None, SuffixDrafter()):
        engine = SpeculativeDecoder(
            target, drafter, 4, verifier, tokenizer=tokenizer, max_batch_size=2
        )
        for _ in range(2):
            made = engine.generate(CODE_PROMPTS[:3], params)
            outputs.append([output.token_ids for output in made])
            rounds = sum(output.stats.rounds for output in made)
            emitted.append(1 + sum(output.stats.accepted for output in made) / rounds)
    assert outputs == [outputs[0]] * 4
    assert emitted[:2] == [1, 1] and emitted[3] > 4 and emitted[3] > 1.7 * emitted[2]

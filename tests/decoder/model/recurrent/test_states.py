"""A row's states and rings against the plain meaning: every token follows its own text's tokens.

Rings hold NaN wherever nothing may be read, and states of rows that nobody lives in do, too.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.decoding import poison_states
from torch import Tensor

from decoder.model.recurrent.placing import Placing
from decoder.model.recurrent.states import RecurrentLayer, RecurrentStates

ROWS, UNDECIDED, WIDTH = 4, 5, 3


def decayed_sum(
    inputs: list[Tensor], states: Tensor, rows: Tensor, keep: Tensor, counts: Tensor
) -> Tensor:
    """A recurrence in which order matters: the state is halved and the token is added."""
    (x,) = inputs
    out = torch.full_like(x, torch.nan)
    for b, row in enumerate(rows.tolist()):
        state = states[row].clone()
        for t in range(int(counts[b])):
            state = state / 2 + x[b, t]
            out[b, t] = state
            if t + 1 == keep[b]:
                states[row] = state
    return out


class Layer:
    """A convolution's window and a recurrence over texts of numbers, and what they must give."""

    def __init__(self) -> None:
        owner = RecurrentStates(ROWS, UNDECIDED, SimpleNamespace(), torch.device("cpu"))
        owner.enter(0, 0)
        self.owner, self.layer = owner, owner.layers[0, 0]

    def forward(
        self, rows: list[int], starts: list[int], texts: list[list[float]], settled: Any = None
    ) -> None:
        """Feed ``texts[b][starts[b]:]`` to each row and hold the outputs to the whole text's."""
        Q = max(len(text) - start for text, start in zip(texts, starts, strict=True))
        positions, x = torch.full((len(rows), Q), -1), torch.full((len(rows), Q, 1), torch.nan)
        for b, (text, start) in enumerate(zip(texts, starts, strict=True)):
            fed = len(text) - start
            positions[b, :fed] = torch.arange(start, len(text))
            x[b, :fed, 0] = torch.tensor(text[start:])
        settled = None if settled is None else torch.tensor(settled)
        placing = Placing(torch.tensor(rows), positions, settled)
        self.layer.calls = 0
        window = self.layer.window(x, WIDTH, placing)
        out = self.layer.recur(decayed_sum, [x], (1,), placing)
        for b, (text, start) in enumerate(zip(texts, starts, strict=True)):
            state, before = torch.zeros(()), [0.0] * (WIDTH - 1) + text
            for p, token in enumerate(text):
                state = state / 2 + token
                if p >= start:
                    assert out[b, p - start, 0] == state
                    seen = window[b, p - start : p - start + WIDTH, 0].tolist()
                    assert seen == before[p : p + WIDTH]


@pytest.mark.parametrize("seed", range(6))
def test_tokens_follow_their_own_text(seed: int) -> None:
    choose, layer = random.Random(seed), Layer()
    texts: dict[int, list[float]] = {}
    draw = lambda n: [float(choose.randint(1, 9)) for _ in range(n)]
    for _ in range(30):
        free = [row for row in range(ROWS) if row not in texts]
        if free and choose.random() < 0.6:  # prompts, in two chunks; all of them stays
            new = choose.sample(free, choose.randint(1, len(free)))
            prompts = [draw(choose.randint(1, 9)) for _ in new]
            cuts = [min(4, len(prompt)) for prompt in prompts]
            heads = [prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)]
            layer.forward(new, [0] * len(new), heads, cuts)
            longer = [i for i, prompt in enumerate(prompts) if len(prompt) > 4]
            if longer:
                rest = [prompts[i] for i in longer]
                layer.forward(
                    [new[i] for i in longer], [4] * len(longer), rest, list(map(len, rest))
                )
            texts |= dict(zip(new, prompts, strict=True))
        if not texts:
            continue
        poison_states(layer.owner, {row: len(text) for row, text in texts.items()})
        live = choose.sample(sorted(texts), choose.randint(1, len(texts)))
        starts = [len(texts[row]) for row in live]
        if choose.random() < 0.5:  # a draft of its own, a token at a time, taken back as a whole
            drafts = [list(texts[row]) for row in live]
            for step in range(choose.randint(1, UNDECIDED)):
                drafts = [draft + draw(1) for draft in drafts]
                layer.forward(live, [n + step for n in starts], drafts, starts)
        tried = [texts[row] + draw(choose.randint(1, UNDECIDED)) for row in live]
        for _ in range(choose.randint(1, 2)):  # a forward that is tried again
            layer.forward(live, starts, tried)
        for row, start, whole in zip(live, starts, tried, strict=True):
            texts[row] = whole[: choose.randint(start + 1, len(whole))]
            if choose.random() < 0.2:
                del texts[row]


def test_what_does_not_follow_is_refused() -> None:
    layer = Layer()
    layer.forward([0], [0], [[1.0, 2.0]], [2])
    with pytest.raises(ValueError, match="follow on"):
        layer.forward([0], [1], [[1.0, 2.0, 3.0]])  # the state has taken that token in
    with pytest.raises(ValueError, match=r"at most 5 tokens of a row .* got 6"):
        layer.forward([0], [2], [[1.0] * 8])
    with pytest.raises(ValueError, match="follow on"):
        layer.forward([0], [3], [[1.0] * 4])  # nobody has given the third


def test_a_row_keeps_one_state_and_little_more() -> None:
    """The shape of Qwen3-Next: 32 value heads of 128, 16 key heads, convolutions of width 4."""
    for dtype in (torch.bfloat16, torch.float32):
        layer = RecurrentLayer(torch.zeros(2, 2, dtype=torch.int64), 4 + 1)
        placing = Placing(torch.arange(2), torch.arange(3).expand(2, 3), None)
        layer.window(torch.zeros(2, 3, 8192, dtype=dtype), 4, placing)
        heads, keys = torch.zeros(2, 3, 32, dtype=dtype), torch.zeros(2, 3, 16, 128, dtype=dtype)
        values = torch.zeros(2, 3, 32, 128, dtype=dtype)
        inputs = [keys, keys, values, heads.float(), heads]
        layer.recur(lambda given, *_: given[2], inputs, (32, 128, 128), placing)
        assert sum(t.nbytes for t in layer.tensors()) <= 1.25 * 2 * 32 * 128 * 128 * 4

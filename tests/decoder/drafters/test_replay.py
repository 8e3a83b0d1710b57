"""Replay drafter: recordings, corruption rate, independence of the batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.scripted import GreedySampler, Script

from decoder.drafters.replay import ReplayDrafter, position_noise


def bound(drafter: ReplayDrafter, rows: int = 4, vocab: int = 50) -> ReplayDrafter:
    runner = SimpleNamespace(static=False, max_batch_size=rows, device=torch.device("cpu"))
    drafter.bind(runner, GreedySampler(vocab), 6)  # type: ignore[arg-type]
    return drafter


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = position_noise(torch.arange(200), torch.arange(500).repeat(200, 1))
    counts = torch.histc(noise, 20, 0, 1)
    chi2 = ((counts - 5000) ** 2 / 5000).sum().item()
    assert chi2 < 60  # 19 degrees of freedom, p ~ 4e-6
    centred = noise - 0.5
    for lag in (1, 2, 7):
        assert abs((centred[:, lag:] * centred[:, :-lag]).mean() * 12) < 0.02
    assert noise.min() >= 0 and noise.max() < 1


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_corruption_rate(alpha: float) -> None:
    output = torch.randint(0, 50, (400,)).tolist()
    drafter = bound(ReplayDrafter(alpha, {(1, 2, seed): output for seed in range(4)}))
    sequences = [[1, 2, seed, *output] for seed in range(4)]
    script = Script(drafter, sequences, [0, 1, 2, 3])
    script.admit([3] * 4)
    intact = total = 0
    for _ in range(90):
        starts = list(script.lengths)
        draft = script.round(4, [3] * 4)
        assert draft is not None and draft.lengths.tolist() == [4] * 4
        assert (draft.tokens < 50).all() and (draft.tokens >= 0).all()
        for row, start in enumerate(starts):
            truth = sequences[row][start + 1 : start + 5]
            intact += sum(a == b for a, b in zip(draft.tokens[row].tolist(), truth, strict=True))
            total += 4
    # 1440 Bernoulli draws: five standard deviations.
    assert abs(intact / total - alpha) <= 5 * (alpha * (1 - alpha) / total) ** 0.5


def test_corruption_depends_on_prompt_and_position_only() -> None:
    output = list(range(30))
    recordings = {(5,): output, (6, 7): output}
    alone = bound(ReplayDrafter(0.5, recordings, seed=3))
    first = Script(alone, [[6, 7, *output]], [0])
    first.admit([2])
    single = first.round(5, [0])
    together = bound(ReplayDrafter(0.5, recordings, seed=3))
    both = Script(together, [[5, *output], [6, 7, *output]], [3, 1])
    both.admit([1, 2])
    pair = both.round(5, [0, 0])
    assert single is not None and pair is not None
    assert pair.tokens[1].tolist() == single.tokens[0].tolist()
    other = Script(bound(ReplayDrafter(0.5, recordings, seed=4)), [[6, 7, *output]], [0])
    other.admit([2])
    changed = other.round(5, [0])
    assert changed is not None and changed.tokens.tolist() != single.tokens.tolist()


def test_proposes_no_further_than_the_recording() -> None:
    script = Script(bound(ReplayDrafter(1.0, {(1,): [2, 3, 4]})), [[1, 2, 3, 4, 9, 9, 9]], [0])
    script.admit([1])
    draft = script.round(5, [1])
    assert draft is not None and draft.lengths.tolist() == [2]
    assert draft.tokens[0, :2].tolist() == [3, 4]
    later = script.round(5, [0])
    assert later is not None and later.lengths.tolist() == [0]


@pytest.mark.parametrize("gamma", [0, 3])
def test_records_an_unknown_prompt_and_replays_it(gamma: int) -> None:
    drafter = bound(ReplayDrafter(1.0))
    sequence = [4, 5, 10, 11, 12, 13, 14]
    script = Script(drafter, [sequence], [2])
    script.admit([2])
    for _ in range(4):
        draft = script.round(gamma, [0])
        assert draft is None or draft.lengths.tolist() == [0]
    drafter.release([2])
    assert drafter.recordings == {(4, 5): [10, 11, 12, 13, 14]}
    script.admit([2])
    draft = script.round(3, [0])
    assert draft is not None and draft.tokens.tolist() == [[11, 12, 13]]


def test_alpha_outside_the_unit_interval() -> None:
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        ReplayDrafter(1.5)

"""The independent drafter proposes its model's own greedy continuation, whatever came before."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support.scripted import GreedySampler, Script
from support.tiny import VOCAB, greedy_reference, random_prompts, tiny_model

from decoder.drafters.independent import IndependentDrafter
from decoder.drafters.vocab import fit_vocab, vocabulary_mismatch
from decoder.model import kernels
from decoder.model.runner import ModelRunner

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["transformers", "kernels"])
def draft_model(request: pytest.FixtureRequest) -> Any:
    """With kernels, the drafter's greedy steps are taken together."""
    model = tiny_model("llama", seed=3, num_hidden_layers=1)
    if request.param == "kernels" and not kernels.accelerate(model):
        pytest.skip("the CPU kernels are not available")
    return model


@pytest.fixture(scope="module")
def target_runner() -> ModelRunner:
    return ModelRunner(tiny_model("llama"), 4, 400)


def start(
    model: Any, runner: ModelRunner, rows: int, seed: int = 0, vocab: int = VOCAB
) -> tuple[Script, IndependentDrafter]:
    drafter = IndependentDrafter(model)
    drafter.bind(runner, GreedySampler(vocab), 6)  # type: ignore[arg-type]
    sequences = random_prompts(rows, seed=seed, low=380, high=390)
    script = Script(drafter, sequences, [2, 0, 3, 1][:rows], follow=True)
    script.admit([1, 5, 12, 3][:rows])
    return script, drafter


def check_round(script: Script, model: Any, gamma: int, accepted: list[int]) -> None:
    starts = list(script.lengths)
    draft = script.round(gamma, accepted)
    if draft is None:
        return
    assert draft.lengths.tolist() == [gamma] * len(starts)
    for row, length in enumerate(starts):
        expected = greedy_reference(model, script.sequences[row][: length + 1], gamma)
        assert draft.tokens[row].tolist() == expected, (row, length)


def test_every_mix_of_acceptance_and_gamma(draft_model: Any, target_runner: ModelRunner) -> None:
    script, _ = start(draft_model, target_runner, 4)
    generator = torch.Generator().manual_seed(0)
    for gamma in (1, 3, 0, 0, 5, 2, 6, 0, 0, 0, 4, 1, 1, 2):
        accepted = torch.randint(0, gamma + 1, (4,), generator=generator).tolist()
        check_round(script, draft_model, gamma, accepted)


@pytest.mark.parametrize("idle", [1, 5, 9, 40, 300])
def test_catches_up_after_rounds_without_drafts(
    idle: int, draft_model: Any, target_runner: ModelRunner
) -> None:
    """Short backlogs ride along with the first step, long ones run first, in chunks."""
    script, _ = start(draft_model, target_runner, 2, seed=1)
    check_round(script, draft_model, 3, [0, 3])  # leaves rejected keys beyond row 0's length
    for _ in range(idle):
        check_round(script, draft_model, 0, [0, 0])
    check_round(script, draft_model, 3, [1, 2])
    check_round(script, draft_model, 3, [3, 0])


def test_full_acceptance_leaves_no_hole(draft_model: Any, target_runner: ModelRunner) -> None:
    script, _ = start(draft_model, target_runner, 2)
    for gamma in (4, 4, 1, 1, 6):
        check_round(script, draft_model, gamma, [gamma, gamma])


def test_overridden_drafts_are_forgotten(draft_model: Any, target_runner: ModelRunner) -> None:
    """With accepted tokens that are not its own drafts, only ``forget_drafts`` keeps it right."""
    script, drafter = start(draft_model, target_runner, 3, seed=2)
    for gamma in (5, 3, 6):
        state = script.state()
        draft = drafter.propose(state, gamma)
        drafter.forget_drafts(state)
        for row, length in enumerate(script.lengths):
            expected = greedy_reference(draft_model, script.sequences[row][: length + 1], gamma)
            assert draft.tokens[row].tolist() == expected
        script.lengths = [length + gamma + 1 for length in script.lengths]


def test_a_row_forgets_the_old_sequence(draft_model: Any, target_runner: ModelRunner) -> None:
    script, drafter = start(draft_model, target_runner, 2)
    check_round(script, draft_model, 4, [4, 4])
    drafter.release(script.rows)
    script.sequences = random_prompts(2, seed=9, low=60, high=60)
    script.admit([2, 7])
    check_round(script, draft_model, 4, [1, 4])
    check_round(script, draft_model, 4, [0, 0])


def test_smaller_and_larger_draft_vocabularies(target_runner: ModelRunner) -> None:
    logits = torch.arange(4.0)
    assert fit_vocab(logits, 3).tolist() == [0, 1, 2]
    assert fit_vocab(logits, 5).tolist() == [0, 1, 2, 3, -torch.inf]
    smaller = tiny_model("llama", seed=3, num_hidden_layers=1, vocab_size=48)
    drafter = IndependentDrafter(smaller, _Tokenizer(48), _Tokenizer(VOCAB))
    drafter.bind(target_runner, GreedySampler(VOCAB), 4)  # type: ignore[arg-type]
    script = Script(drafter, random_prompts(2, low=40, high=40), [0, 1])  # holds ids >= 48
    script.admit([3, 4])
    draft = script.round(4, [2, 0])
    assert draft is not None and int(draft.tokens.max()) < 48


class _Tokenizer:
    def __init__(self, size: int, **changed: int) -> None:
        self._vocab = {f"t{i}": i for i in range(size)} | changed

    def get_vocab(self) -> dict[str, int]:
        return self._vocab


def test_vocabulary_comparison(target_runner: ModelRunner) -> None:
    assert vocabulary_mismatch(_Tokenizer(10), _Tokenizer(7)) is None
    other = _Tokenizer(10)
    del other._vocab["t4"]
    other._vocab["x"] = 4
    assert vocabulary_mismatch(_Tokenizer(10), other) == (
        "token 4 is 't4' for the target and 'x' for the draft"
    )
    model = tiny_model("llama", vocab_size=48, num_hidden_layers=1)
    with pytest.raises(ValueError, match="64 and 48 tokens; pass both tokenizers"):
        IndependentDrafter(model).bind(target_runner, GreedySampler(VOCAB), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token 4 is 't4' for the target"):
        IndependentDrafter(model, other, _Tokenizer(VOCAB)).bind(
            target_runner,
            GreedySampler(VOCAB),
            2,  # type: ignore[arg-type]
        )


def test_short_draft_context(target_runner: ModelRunner, caplog: pytest.LogCaptureFixture) -> None:
    """Whether its positions are a table or computed, none beyond its context is asked of it."""
    for family in ("opt", "llama"):
        drafter = IndependentDrafter(tiny_model(family, max_position_embeddings=64))
        with caplog.at_level(logging.WARNING):
            drafter.bind(target_runner, GreedySampler(VOCAB), 4)  # type: ignore[arg-type]
        assert "the draft model has 64 positions and rows may hold 400" in caplog.text
        script = Script(drafter, random_prompts(3, low=90, high=90), [0, 2, 1])
        script.admit([10, 59, 80])
        lengths = [script.round(4, [0, 0, 0]).lengths.tolist() for _ in range(6)]
        assert lengths == [[4, min(4, 64 - n), 0] for n in range(59, 65)]
        script.lengths[0] = 70
        assert script.round(4, [0, 0, 0]).lengths.tolist() == [0, 0, 0]

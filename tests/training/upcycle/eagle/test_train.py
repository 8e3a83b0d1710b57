"""Training the EAGLE-3 head: it learns, its acceptance is drafting's, a run goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters.eagle import EagleDrafter
from training.optim import Budget
from training.upcycle.eagle import train
from training.upcycle.eagle.accept import TURN, acceptance, answered
from training.upcycle.eagle.data import Batch, annotated, cut
from training.upcycle.eagle.train import DRAFTS, Run

V = 64


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=1280,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def own_text(dense: LlamaForCausalLM) -> list[list[int]]:
    """The target's own greedy continuations of 24 random prompts."""
    prompts = torch.randint(2, V, (24, 4)).tolist()
    writer = SpeculativeDecoder(dense, gamma=0, max_batch_size=24, max_length=64)
    outputs = writer.generate(prompts, SamplingParams(max_new_tokens=28))
    pairs = zip(prompts, outputs, strict=True)
    return [prompt + out.token_ids for prompt, out in pairs]


def texts(own_text: list[list[int]]) -> dict[str, dict[str, list[list[int]]]]:
    return {"train": {"chat": own_text}, "held_out": {"chat": own_text[:8]}}


@pytest.fixture
def run(dense, own_text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(train, "BATCH_TOKENS", 256)
    monkeypatch.setattr(train, "PART_ROWS", 16)
    return Run(dense, dense, texts(own_text), tmp_path, Budget(None, 12_000), "cpu")


def test_it_learns_and_goes_on_from_its_checkpoint(run: Run, dense, own_text) -> None:
    run.train()
    again = Run(dense, dense, texts(own_text), run.folder, Budget(None, 24_000), "cpu")
    assert not again.unseen
    assert (again.steps, again.budget.tokens_done) == (run.steps, run.budget.tokens_done)
    assert again.budget.seconds_before > 0
    for ours, theirs in zip(run.head.parameters(), again.head.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    log = (run.folder / "eagle.log").read_text()
    first, last = (float(alpha) for alpha in re.findall(r"alpha ([\d.]+)", log))
    assert last > first + 0.2


def test_only_rows_that_are_new_are_annotated(run: Run, dense, own_text) -> None:
    run.annotate()
    more = texts([*own_text, [7] * 20])
    assert len(Run(dense, dense, more, run.folder, Budget(None, 1), "cpu").unseen) == 1


def test_some_rows_are_annotated_however_little_is_left(run: Run) -> None:
    run.budget.tokens_done = 11_000
    run.annotate()
    assert run.lessons.tokens > 0


def test_measured_acceptance_is_that_of_drafting(run: Run, dense, own_text) -> None:
    """On the target's own greedy text, over every place at once, and by the decoder's rounds.

    Of a head that is often wrong everywhere: rounds come to more of the places where one is wrong.
    """
    run.budget.tokens = 4000
    run.train()
    run.export(run.folder / "head")
    drafted = SpeculativeDecoder(
        dense, drafter=EagleDrafter(run.folder / "head"), gamma=1, max_batch_size=24, max_length=64
    )
    drafted.generate([row[:4] for row in own_text], SamplingParams(max_new_tokens=28))
    batches = [
        annotated(dense, cut(own_text), run.head.config["eagle_aux_hidden_state_layer_ids"], "cpu")
    ]
    measured = acceptance(run.head, dense, run.vocabulary, batches, DRAFTS)
    assert 0.2 < measured.by_depth[0] < 1.0
    assert drafted.stats.alpha == pytest.approx(measured.by_depth[0], abs=0.12)
    assert measured.reached.tolist() == sorted(measured.reached.tolist(), reverse=True)
    assert 0.0 < measured.sampled < 1.0


def test_only_the_last_turn_of_a_conversation_counts() -> None:
    ids = torch.tensor([[TURN, 5, 6, 7, TURN, 5, 6, 8, 9, 0], [9] * 10])
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, 9] = False
    batch = Batch(ids, real, torch.empty(0), torch.empty(0))
    assert answered(batch)[0].nonzero().flatten().tolist() == [7, 8]
    assert answered(batch)[1].all()


def test_no_text_is_an_error(dense, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected texts to train on"):
        Run(dense, dense, texts([[1, 2]]), tmp_path, Budget(None, 1), "cpu")

"""Training the EAGLE-3 head: it learns, its acceptance is drafting's, a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decoder import SamplingParams, SpeculativeDecoder
from decoder.drafters.eagle import EagleDrafter
from training.optim import Budget
from training.upcycle import eagle_train
from training.upcycle.eagle_accept import TURN, acceptance, answered
from training.upcycle.eagle_data import Batch, annotated, cut
from training.upcycle.eagle_train import DEPTHS, Run, Settings

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


@pytest.fixture
def run(dense, own_text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(eagle_train, "CHUNK_ROWS", 16)
    texts = {"train": {"chat": own_text}, "held_out": {"chat": own_text[:8]}}
    return Run(dense, dense, texts, tmp_path, Budget(1.0, None), Settings())


def test_it_learns_and_goes_on_from_its_checkpoint(run: Run, dense, own_text) -> None:
    losses = [run.chunk() for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    run.save()
    texts = {"train": {"chat": own_text}, "held_out": {"chat": own_text[:8]}}
    again = Run(dense, dense, texts, run.folder, Budget(1.0, None), run.settings)
    assert again.budget.tokens_done == run.budget.tokens_done > 0
    assert again.budget.seconds_before > 0
    for ours, theirs in zip(run.head.parameters(), again.head.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    next_rows = [stream.take(3) for stream in (run.stream, again.stream)]
    assert all(torch.equal(a, b) for a, b in zip(*next_rows, strict=True))


def test_a_spent_budget_leaves_a_log_and_a_checkpoint(run: Run) -> None:
    run.budget.seconds_before = 60.0
    run.train()
    assert run.checkpoint.exists()
    assert (run.folder / "eagle.log").read_text().count("chat alpha") == 2


def test_measured_acceptance_is_that_of_drafting(run: Run, dense, own_text) -> None:
    """On the target's own greedy text, over every place at once, and by the decoder's rounds."""
    for _ in range(12):
        run.chunk()
    run.export(run.folder / "head")
    drafted = SpeculativeDecoder(
        dense, drafter=EagleDrafter(run.folder / "head"), gamma=1, max_batch_size=24, max_length=64
    )
    drafted.generate([row[:4] for row in own_text], SamplingParams(max_new_tokens=28))
    batches = [
        annotated(dense, cut(own_text), run.head.config["eagle_aux_hidden_state_layer_ids"], "cpu")
    ]
    measured = acceptance(run.head, dense, run.vocabulary, batches, DEPTHS)
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

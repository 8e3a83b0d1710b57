"""The draft's scales learn the target's distribution; a run goes on and ends as an asset."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.tiny_smol import tiny_llama

from training.optim import Budget
from training.upcycle import draft
from training.upcycle.draft import Divergence, Trainer, tune
from training.upcycle.install import changes

IDS = torch.arange(3, 35).view(2, 16)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(draft, "BATCH_TOKENS", 64)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    rows = [
        {"index": i, "prompt_tokens": 4, "token_ids": list(range(3 + i, 35 + i))} for i in range(40)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def teacher():
    """The dense model with other scales: what a draft can become."""
    model = tiny_llama()
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.down_proj.weight
            grown = weight.unflatten(1, (-1, 32)) * (1 + torch.randn(len(weight), 3, 1))
            weight.copy_(grown.flatten(1))
    return model


def divergence(student) -> float:
    with torch.no_grad():
        wanted, found = (m(IDS).logits.log_softmax(-1) for m in (teacher(), student))
    return F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean().item()


def test_the_divergence_and_its_gradient() -> None:
    torch.manual_seed(0)
    head, theirs, wanted = torch.randn(40, 8), torch.randn(40, 8), torch.randn(5, 8)
    found = torch.randn(5, 8, requires_grad=True)
    loss = Divergence.apply(found, head, wanted, theirs)
    loss.backward()
    gradient, found.grad = found.grad, None
    log_probs = [(x @ h.T).log_softmax(-1) for x, h in ((found, head), (wanted, theirs))]
    expected = F.kl_div(*log_probs, log_target=True, reduction="batchmean")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, found.grad)


def test_an_untrained_draft_is_the_dense_model() -> None:
    model = tiny_llama()
    layers = tune(model)
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert all(
        p.requires_grad == ("scale" in n or "least" in n) for n, p in model.named_parameters()
    )
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)


def test_it_comes_closer_to_the_target(run_dir: Path) -> None:
    trainer = Trainer(tiny_llama(), teacher(), run_dir, Budget(None, 6000))
    trainer.train()
    assert divergence(trainer.draft) < 0.9 * divergence(tiny_llama())


def test_a_run_goes_on_where_it_stopped(run_dir: Path) -> None:
    first = Trainer(tiny_llama(), teacher(), run_dir, Budget(None, 200))
    first.train()
    second = Trainer(tiny_llama(), teacher(), run_dir, Budget(None, 400))
    assert second.budget.tokens_done == first.budget.tokens_done
    assert second.next_row == first.next_row
    for name, layer in first.layers.items():
        assert torch.equal(second.layers[name].scale, layer.scale)
    second.train()
    assert second.budget.tokens_done >= 400


def test_prompts_and_padding_do_not_count(run_dir: Path) -> None:
    trainer = Trainer(tiny_llama(), teacher(), run_dir, Budget(None, 1))
    trainer.rows = [
        {"index": 0, "prompt_tokens": 4, "token_ids": list(range(10))},
        {"index": 1, "prompt_tokens": 1, "token_ids": list(range(60))},
    ]
    _, mask, counted = trainer._batch()
    assert mask.sum(1).tolist() == [10, 60]
    assert counted[0].nonzero().flatten().tolist() == list(range(3, 9))
    assert counted[1].nonzero().flatten().tolist() == list(range(59))


def test_changes_are_in_the_files_order() -> None:
    model = tiny_llama()
    config, query = model.config, model.model.layers[1].self_attn.q_proj.weight
    layers = tune(model)
    state = {name: layer.state_dict() for name, layer in layers.items()}
    name = "model.layers.1.self_attn.q_proj"
    state[name] = {"scale": query[:, :2].detach(), "least": query[:, 2:4].detach()}
    found = changes(state, dict.fromkeys(layers, 2.0), config)
    # As llama.cpp's converter turns the rows of a query matrix.
    rows = query.view(4, 2, -1, query.shape[1]).transpose(1, 2).reshape(query.shape)
    scale, least = found["blk.1.attn_q.weight"]
    assert torch.equal(scale, rows[:, :2])
    assert torch.equal(least, 2 * rows[:, 2:4])
    assert found["blk.5.ffn_down.weight"][0].shape == (config.hidden_size, 3)


def test_without_conversations_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected conversations in .*answers.jsonl, got none"):
        Trainer(tiny_llama(), teacher(), tmp_path, Budget(None, 1))

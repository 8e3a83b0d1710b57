"""The upcycled layers in training are the model that is built of them; a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.tiny_smol import tiny_llama
from transformers import AutoModelForCausalLM

from decoder.smol.difference import Difference, write_difference
from decoder.smol.layout import write_target
from training.optim import Budget
from training.upcycle import target
from training.upcycle.experts import NUM_EXPERTS, balance_loss, upcycle
from training.upcycle.install import factors
from training.upcycle.target import NextTokenLoss, Trainer

IDS = torch.arange(3, 35).view(2, 16)
TEXTS = {kind: [list(range(3, 90)), list(range(90, 20, -1))] for kind in target.SHARES}


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(target, "LENGTH", 16)


def trainer(folder: Path, tokens: int) -> Trainer:
    return Trainer(tiny_llama(), TEXTS, folder, Budget(None, tokens))


def test_what_is_built_of_it_computes_the_same(tmp_path: Path) -> None:
    made = trainer(tmp_path, 640)
    made.train()
    dense = tiny_llama()
    factors_ = factors(torch.load(made.checkpoint, weights_only=True)["layers"])
    write_difference(tmp_path / "difference.safetensors", factors_)
    folder = tmp_path / "target"
    folder.mkdir()
    fields = dense.config.to_dict() | {"architectures": None, "dtype": None}
    write_target(
        folder,
        {k: v for k, v in fields.items() if k not in ("model_type", "architectures", "dtype")},
        dense.state_dict(),
        Difference(tmp_path / "difference.safetensors"),
        lambda: None,
    )
    built = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = dense(IDS).logits
        expected = made.model(IDS).logits
        found = built(IDS).logits
    # 8-bit factors and bf16 weights on one side; the differences themselves are far larger.
    assert (found - expected).norm() < 0.05 * (found - plain).norm()


def test_what_is_added_lies_where_the_model_does() -> None:
    model = tiny_llama()
    with torch.device("meta"):  # what a tensor's device is that nobody names: not the model's
        layers = upcycle(model, seed=0)
    devices = {p.device.type for layer in layers for p in layer.parameters()}
    assert devices == {"cpu"}


def test_experts_differ_and_their_number_matters() -> None:
    model = tiny_llama()
    layers = upcycle(model, seed=0)
    outputs = []
    for layer in layers:
        layer.top_k = 1
    for top_k in (1, 2, NUM_EXPERTS):
        for layer in layers:
            layer.top_k = top_k
        with torch.no_grad():
            outputs.append(model(IDS).logits)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-4)


def test_balance_is_one_when_even_and_more_when_not() -> None:
    layers = upcycle(tiny_llama(), seed=0)[:1]
    every = torch.arange(NUM_EXPERTS)
    layers[0].chosen = torch.stack([every, every.roll(1)], dim=1)
    layers[0].probs = torch.full((NUM_EXPERTS, NUM_EXPERTS), 1 / NUM_EXPERTS)
    assert balance_loss(layers).item() == pytest.approx(1.0)
    layers[0].chosen = torch.zeros_like(layers[0].chosen)
    layers[0].probs = F.one_hot(torch.zeros(NUM_EXPERTS, dtype=torch.int64), NUM_EXPERTS).float()
    assert balance_loss(layers).item() == pytest.approx(NUM_EXPERTS)


def test_the_loss_is_cross_entropy_and_so_is_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "LOSS_CHUNK", 5)
    torch.manual_seed(0)
    hidden, head = torch.randn(13, 8, requires_grad=True), torch.randn(29, 8)
    labels = torch.randint(29, (13,))
    expected = F.cross_entropy(hidden @ head.T, labels)
    (wanted,) = torch.autograd.grad(2 * expected, hidden)
    found = NextTokenLoss.apply(hidden, head, labels)
    (got,) = torch.autograd.grad(2 * found, hidden)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(got, wanted)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """To the same weights as one that was not stopped, but for the learning rate's schedule."""
    half = trainer(tmp_path, 128)
    half.train()
    whole = trainer(tmp_path, 256)
    assert whole.budget.tokens_done == 128
    torch.testing.assert_close(whole.layers[0].router, half.layers[0].router)
    torch.testing.assert_close(whole.stream.batch(4, 16), half.stream.batch(4, 16))
    whole.train()
    assert whole.budget.tokens_done == 256
    assert not torch.equal(whole.layers[0].router, half.layers[0].router)

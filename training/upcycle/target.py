"""Train the experts' differences and the routers; everything else of the dense model is frozen."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.checkpoint import load_checkpoint, save_checkpoint
from training.data import TokenStream
from training.optim import Budget, spend
from training.upcycle.experts import UpcycledFFN, balance_loss, upcycle

SEED = 22
SEPARATOR = 0  # <|endoftext|>, between two documents
SHARES = {"code": 0.45, "docs": 0.2, "chat": 0.35}
ROWS, LENGTH = 4, 256
LEARNING_RATE, ROUTER_RATE = 1.5e-3, 1e-3
BALANCE = 0.02
LOSS_CHUNK = 256  # positions whose logits exist at once


class NextTokenLoss(torch.autograd.Function):
    """Mean cross entropy (nats) of frozen-head logits, never all of them in memory.

    Hidden states ``[N, H]``, head ``[V, H]``, labels int64 ``[N]`` -> scalar fp32.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels):
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            logits = (hidden[part] @ head.T).float()
            log_probs = logits.log_softmax(-1)
            wanted = labels[part, None]
            total -= log_probs.gather(1, wanted).sum()
            probs = log_probs.exp_()
            probs.scatter_add_(1, wanted, probs.new_full(wanted.shape, -1.0))
            gradient[part] = probs.to(hidden.dtype) @ head
        ctx.save_for_backward(gradient / len(hidden))
        return total / len(hidden)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy (nats) over ids int64 ``[rows, length]``."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = hidden[:, :-1].flatten(0, 1)
    return NextTokenLoss.apply(hidden, model.lm_head.weight, ids[:, 1:].flatten())


class Trainer:
    """The upcycled model, its optimizer and its texts, going on from ``run_dir/target.pt``.

    Args:
        dense: a Llama model in bf16, changed in place.
        documents: training ids by kind.
        run_dir: where the checkpoint and the log lie.
        budget: how long to train.
    """

    def __init__(self, dense: Any, documents: dict, run_dir: Path, budget: Budget):
        self.model, self.budget = dense, budget
        self.layers: list[UpcycledFFN] = upcycle(dense, SEED)
        self.checkpoint, self.log = run_dir / "target.pt", run_dir / "target.log"
        self.stream = TokenStream(documents, SHARES, SEPARATOR, SEED)
        routers = [layer.router for layer in self.layers]
        differences = [p for layer in self.layers for p in layer.differences.parameters()]
        self.parameters = differences + routers
        self.optimizer = torch.optim.AdamW(
            [
                {"params": differences, "lr": LEARNING_RATE, "peak": LEARNING_RATE},
                {"params": routers, "lr": ROUTER_RATE, "peak": ROUTER_RATE},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        if self.checkpoint.exists():
            self._load(load_checkpoint(self.checkpoint))

    def train(self) -> None:
        """Until the budget is spent; a checkpoint every few minutes and at the end."""
        spend(self.budget, self.log, self._step, self._save)

    def _step(self) -> dict[str, float]:
        ids = self.stream.batch(ROWS, LENGTH - 1).to(self.model.device)
        loss = losses(self.model, ids)
        balance = balance_loss(self.layers)
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.budget.lr_factor(warmup=0.03, decay_from=0.5)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.budget.tokens_done += ids.numel()
        return {"loss": loss.item(), "balance": balance.item()}

    def _save(self) -> None:
        state = {
            "layers": [_trained(layer) for layer in self.layers],
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state_dict(),
            "tokens": self.budget.tokens_done,
            "seconds": self.budget.seconds,
        }
        save_checkpoint(state, self.checkpoint)

    def _load(self, state: dict) -> None:
        _fill(self.layers, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state_dict(state["stream"])
        self.budget.tokens_done, self.budget.seconds_before = state["tokens"], state["seconds"]


def _fill(layers: list[UpcycledFFN], state: dict) -> None:
    for layer, trained in zip(layers, state["layers"], strict=True):
        layer.load_state_dict(trained, strict=False)


def _trained(layer: UpcycledFFN) -> dict[str, torch.Tensor]:
    """A layer's parameters without the dense ones."""
    state = layer.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("dense.")}

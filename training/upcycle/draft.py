"""Tune the dense draft to the target by the scales of its 4-bit blocks; the codes stay.

The file's Q4_1 weights are ``scale * code + least`` in blocks of 32; only scales and leasts learn,
so the draft keeps its format and speed ("PEQA", Kim et al. 2023, arXiv 2305.14152). What they learn
is the target's distribution at every token of a conversation ("DistillSpec", Zhou et al. 2024,
arXiv 2310.08461, with the forward divergence on fixed texts).
"""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from training.checkpoint import load_checkpoint, save_checkpoint
from training.data import is_held_out
from training.optim import Budget, spend
from training.upcycle.answers import read_answers

SEED = 23
BLOCK = 32
BATCH_TOKENS = 3000
RATE = 2e-3
LOSS_CHUNK = 1024  # positions whose logits exist at once


class Tuned(nn.Module):
    """Stands where a linear layer without bias stood: ``W * (1 + scale) + least``, by blocks.

    Args:
        linear: bf16, ``[out, in]``, frozen.

    Attributes:
        scale: fp32 ``[out, in / 32]``, by which a block's weights grow.
        least: the same, added to them, in units of the layer's mean magnitude ``unit``.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.dense = linear.weight.detach()
        rows, depth = self.dense.shape
        self.unit = self.dense.float().abs().mean().item()
        self.scale = nn.Parameter(torch.zeros(rows, depth // BLOCK, device=self.dense.device))
        self.least = nn.Parameter(torch.zeros_like(self.scale))

    def weight(self) -> torch.Tensor:
        """bf16 ``[out, in]``."""
        blocks = self.dense.unflatten(1, (-1, BLOCK)).float()
        tuned = blocks * (1 + self.scale[..., None]) + self.least[..., None] * self.unit
        return tuned.flatten(1).to(self.dense.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        return F.linear(x, self.weight())


def tune(dense: Any) -> dict[str, Tuned]:
    """Replace every linear layer of a Llama's blocks in place; by name."""
    dense.requires_grad_(False)
    layers = {}
    for name, module in list(dense.model.named_modules()):
        if isinstance(module, nn.Linear):
            layers[f"model.{name}"] = tuned = Tuned(module)
            parent, _, leaf = name.rpartition(".")
            setattr(dense.model.get_submodule(parent), leaf, tuned)
    return layers


class Divergence(torch.autograd.Function):
    """Mean KL(target | draft) in nats from last hidden states ``[N, H]`` of both.

    ``draft_hidden`` and the heads ``[V, H]``; never all logits in memory -> scalar fp32.
    """

    @staticmethod
    def forward(ctx, draft_hidden, draft_head, target_hidden, target_head):
        total = draft_hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(draft_hidden)
        for start in range(0, len(draft_hidden), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            wanted = (target_hidden[part] @ target_head.T).float().log_softmax(-1)
            found = (draft_hidden[part] @ draft_head.T).float().log_softmax(-1)
            probs = wanted.exp()
            total += (probs * (wanted - found)).sum()
            gradient[part] = (found.exp_() - probs).to(draft_hidden.dtype) @ draft_head
        ctx.save_for_backward(gradient / len(draft_hidden))
        return total / len(draft_hidden)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


class Trainer:
    """The draft, its teacher and the conversations, going on from ``run_dir/draft.pt``.

    Args:
        dense: the Llama of the package's file in bf16, changed in place.
        target: the model that it will draft for, frozen, on the same device.
        run_dir: where ``answers.jsonl``, the checkpoint and the log lie.
        budget: how long to train.
    """

    def __init__(self, dense: Any, target: Any, run_dir: Path, budget: Budget):
        self.draft, self.target, self.budget = dense, target, budget
        self.layers = tune(dense)
        self.checkpoint, self.log = run_dir / "draft.pt", run_dir / "draft.log"
        self.parameters = [p for layer in self.layers.values() for p in layer.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0
        )
        answers = read_answers(run_dir / "answers.jsonl")
        self.rows = [row for row in answers if not is_held_out(f"conversation:{row['index']}")]
        if not self.rows:
            raise ValueError(f"expected conversations in {run_dir / 'answers.jsonl'}, got none")
        random.Random(SEED).shuffle(self.rows)
        self.next_row = 0
        if self.checkpoint.exists():
            self._load(load_checkpoint(self.checkpoint))

    def train(self) -> None:
        """Until the budget is spent; a checkpoint every few minutes and at the end."""
        spend(self.budget, self.log, self._step, self._save)

    def _step(self) -> dict[str, float]:
        ids, mask, counted = self._batch()
        with torch.no_grad():
            wanted = self.target.model(ids, attention_mask=mask).last_hidden_state[counted]
        found = self.draft.model(ids, attention_mask=mask).last_hidden_state[counted]
        heads = self.draft.lm_head.weight, self.target.lm_head.weight
        loss = Divergence.apply(found, heads[0], wanted, heads[1])
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * self.budget.lr_factor(warmup=0.03, decay_from=0.3)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.budget.tokens_done += int(mask.sum())
        return {"divergence": loss.item()}

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids, attention mask and which places' next token is an answer's: ``[rows, length]``."""
        rows: list[dict] = []
        while sum(len(row["token_ids"]) for row in rows) < BATCH_TOKENS:
            rows.append(self.rows[self.next_row % len(self.rows)])
            self.next_row += 1
        length = max(len(row["token_ids"]) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask, counted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            end = len(row["token_ids"])
            ids[i, :end], mask[i, :end] = torch.tensor(row["token_ids"]), 1
            counted[i, max(row["prompt_tokens"] - 1, 0) : end - 1] = True
        device = self.draft.device
        return ids.to(device), mask.to(device), counted.to(device)

    def _save(self) -> None:
        state = {
            "layers": {name: layer.state_dict() for name, layer in self.layers.items()},
            "units": {name: layer.unit for name, layer in self.layers.items()},
            "optimizer": self.optimizer.state_dict(),
            "next_row": self.next_row,
            "tokens": self.budget.tokens_done,
            "seconds": self.budget.seconds,
        }
        save_checkpoint(state, self.checkpoint)

    def _load(self, state: dict) -> None:
        for name, layer in self.layers.items():
            layer.load_state_dict(state["layers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.next_row = state["next_row"]
        self.budget.tokens_done, self.budget.seconds_before = state["tokens"], state["seconds"]

"""Train the EAGLE-3 head: distillation at every draft depth, held-out acceptance, checkpoints.

A run lives in a folder and goes on from what is there, also over another target of the same shapes:
the dense model at first, whose features are cheap, then the sparse one that came of it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from training.checkpoint import save_checkpoint
from training.data import SEED
from training.optim import Budget, Optimizers
from training.teacher import ARGMAX_WEIGHT

from .eagle_accept import acceptance
from .eagle_data import Batch, RowStream, Texts, annotated, cut, draft_vocabulary, grouped
from .eagle_head import Eagle3, head_config, save_head, start_from_dense

VOCABULARY = 8192
DEPTHS = 4
DEPTH_WEIGHT = 0.8  # of a depth, over the one before it
BATCH_TOKENS = 1024
CHUNK_ROWS = 64  # between two places where a run can stop and go on
HELD_OUT_ROWS = 24  # of each domain
MINUTES_BETWEEN_CHECKPOINTS = 3.0


@dataclass(frozen=True)
class Settings:
    """What a run may choose.

    Attributes:
        device: ``cpu`` or ``cuda``.
        passes: over each chunk of rows, once the target has annotated it.
        muon_lr, adam_lr: peak learning rates of matrices and norms.
    """

    device: str = "cpu"
    passes: int = 1
    muon_lr: float = 0.02
    adam_lr: float = 2e-3


def head_loss(
    head: Eagle3, batch: Batch, embedding: torch.Tensor, rows: torch.Tensor, depths: int
) -> torch.Tensor:
    """Mean over depths, by DEPTH_WEIGHT, of the cross entropy against the target's distribution.

    The distribution is the target's over the draft vocabulary, sharpened towards its arg-max: the
    one trains acceptance when sampling, the other acceptance when greedy.

    Args:
        head: the head.
        batch: annotated rows.
        embedding: ``[V, H]``, the target's.
        rows: ``[draft vocabulary, H]``, the target's output rows.
        depths: how many to unroll.
    """
    outputs = head.depths(F.embedding(batch.ids[:, 1:], embedding), batch.features[:, :-1], depths)
    with torch.no_grad():
        wanted = (batch.last[:, 1:] @ rows.T).float().softmax(-1)
        top = wanted.argmax(-1, keepdim=True)
        sharp = torch.full_like(top, ARGMAX_WEIGHT, dtype=wanted.dtype)
        wanted = wanted.mul_(1 - ARGMAX_WEIGHT).scatter_add_(-1, top, sharp)
    losses = []
    for depth, output in enumerate(outputs):
        counted = batch.real[:, 1:].clone()
        counted[:, :depth] = False
        logits = (output[counted] @ rows.T).float()
        losses.append(F.cross_entropy(logits, wanted[counted]))
    weights = torch.tensor([DEPTH_WEIGHT**depth for depth in range(depths)], device=rows.device)
    return (torch.stack(losses) * weights).sum() / weights.sum()


class Run:
    """One head in training.

    Args:
        target: a transformers causal language model, frozen, on the device.
        dense: the Llama that the head's weights begin as.
        texts: token ids by part (``train``, ``held_out``) and domain.
        folder: of checkpoint and log, made if need be.
        budget: how long to train, over all resumed parts.
        settings: see there.
    """

    def __init__(
        self,
        target,
        dense,
        texts: dict[str, Texts],
        folder: Path,
        budget: Budget,
        settings: Settings,
    ):
        torch.manual_seed(SEED)
        self.target, self.folder, self.settings = target, folder, settings
        vocab, device = target.config.vocab_size, settings.device
        self.vocabulary = draft_vocabulary(texts["train"], vocab, min(VOCABULARY, vocab)).to(device)
        self.head = Eagle3(head_config(target.config, len(self.vocabulary)))
        start_from_dense(self.head, dense)
        self.head.to(device).train()
        self.optimizers = Optimizers(self.head, settings.muon_lr, settings.adam_lr)
        self.stream = RowStream(texts["train"], SEED)
        self.budget = budget
        self.rows = target.get_output_embeddings().weight[self.vocabulary]
        self.held_out = {
            domain: self.annotated(cut(documents)[:HELD_OUT_ROWS])
            for domain, documents in texts["held_out"].items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder / "eagle.pt"
        if self.checkpoint.exists():
            self.restore()

    def annotated(self, rows: list[torch.Tensor]) -> list[Batch]:
        """The target's view of rows, by batches."""
        layers = self.head.config["eagle_aux_hidden_state_layer_ids"]
        return [
            annotated(self.target, group, layers, self.settings.device)
            for group in grouped(rows, BATCH_TOKENS)
        ]

    def train(self) -> Eagle3:
        """Spend the budget; the held-out acceptance at every checkpoint goes to the log."""
        loss, saved = float("nan"), self.budget.seconds
        self.report(loss)
        while self.budget.progress < 1.0:
            loss = self.chunk()
            if self.budget.seconds - saved > 60 * MINUTES_BETWEEN_CHECKPOINTS:
                self.save()
                self.report(loss)
                saved = self.budget.seconds
        self.save()
        self.report(loss)
        return self.head

    def chunk(self) -> float:
        """Train on the next CHUNK_ROWS rows; the mean loss."""
        batches = self.annotated(self.stream.take(CHUNK_ROWS))
        losses = []
        for _ in range(self.settings.passes):
            for index in torch.randperm(len(batches)).tolist():
                losses.append(self.step(batches[index]))
        self.budget.tokens_done += sum(int(batch.real.sum()) for batch in batches)
        return sum(losses) / len(losses)

    def step(self, batch: Batch) -> float:
        """One update; under autocast the optimizer's own products are in bf16, too."""
        # Shallow first: deeper depths only make sense once the first one predicts something.
        depths = min(DEPTHS, 1 + int(self.budget.progress * 2 * DEPTHS))
        with torch.autocast(self.settings.device, torch.bfloat16):
            embedding = self.target.get_input_embeddings().weight
            loss = head_loss(self.head, batch, embedding, self.rows, depths)
            loss.backward()
            self.optimizers.step(self.budget.lr_factor())
        return loss.item()

    def report(self, loss: float) -> None:
        """Print and log minutes, tokens, loss and each domain's held-out acceptance."""
        parts = [
            f"{self.budget.seconds / 60:.1f} min",
            f"{self.budget.tokens_done} tokens",
            f"loss {loss:.3f}",
        ]
        for domain, batches in self.held_out.items():
            got = acceptance(self.head, self.target, self.vocabulary, batches, DEPTHS)
            depths = " ".join(f"{rate:.2f}" for rate in got.by_depth)
            parts.append(f"{domain} alpha {got.alpha:.3f} ({depths}) sampled {got.sampled:.3f}")
        line = " · ".join(parts)
        print(line, flush=True)
        with (self.folder / "eagle.log").open("a") as log:
            log.write(line + "\n")

    def save(self) -> None:
        """Write the checkpoint; an interrupted writing leaves the one before."""
        state = {
            "head": self.head.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "drawn": self.stream.drawn,
            "vocabulary": self.vocabulary,
            "tokens": self.budget.tokens_done,
            "seconds": self.budget.seconds,
        }
        save_checkpoint(state, self.checkpoint)

    def restore(self) -> None:
        """Go on from the checkpoint."""
        device = self.settings.device
        state = torch.load(self.checkpoint, weights_only=True, map_location=device)
        self.head.load_state_dict(state["head"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.stream.drawn = state["drawn"]
        self.vocabulary = state["vocabulary"]
        self.rows = self.target.get_output_embeddings().weight[self.vocabulary]
        self.budget.tokens_done, self.budget.seconds_before = state["tokens"], state["seconds"]

    def export(self, out: Path) -> None:
        """Write the head in the published layout."""
        save_head(self.head, self.vocabulary, self.target.get_output_embeddings().weight, out)

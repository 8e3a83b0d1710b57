"""Train the EAGLE-3 head: distillation at every draft depth, held-out acceptance, checkpoints.

The target reads every row once; passes over what it made of them follow until the budget is spent.
A run lives in a folder and goes on from what is there, also with more rows.
"""

import math
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from training.checkpoint import load_checkpoint, save_checkpoint
from training.data import SEED
from training.optim import Budget, Optimizers

from .accept import acceptance
from .data import Batch, Texts, annotated, cut, draft_vocabulary, grouped, mixed
from .head import Eagle3, head_config, save_head, start_from_dense
from .lessons import PART_ROWS, Lesson, Lessons
from .loss import head_loss

VOCABULARY = 8192
ANNOTATING = 0.6  # of the budget, at most: on a CPU a pass over a row takes a quarter of that
DEEPER = (0.4, 0.7)  # where in training the head is unrolled by one depth more
DRAFTS = 4  # of a chain whose acceptance is measured
BATCH_TOKENS = 4096
MUON_RATE, NORM_RATE, DECAY_FROM = 0.02, 2e-3, 0.3
HELD_OUT_ROWS = 24  # of each domain
MINUTES_BETWEEN_CHECKPOINTS = 3.0


class Run:
    """One head in training.

    Args:
        target: a transformers causal language model, frozen, on the device.
        dense: the Llama that the head's weights begin as.
        texts: token ids by part (``train``, ``held_out``) and domain.
        folder: of checkpoint and log, made if need be.
        budget: how long to train, over all resumed parts.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self,
        target,
        dense,
        texts: dict[str, Texts],
        folder: Path,
        budget: Budget,
        device: str,
    ):
        torch.manual_seed(SEED)
        self.target, self.folder, self.device = target, folder, device
        vocab = target.config.vocab_size
        self.lessons = Lessons(folder / "lessons")
        vocabulary = self.lessons.vocabulary
        if vocabulary is None:
            vocabulary = draft_vocabulary(texts["train"], vocab, min(VOCABULARY, vocab))
            self.lessons.vocabulary = vocabulary
        self.vocabulary = vocabulary.to(device)
        self.head = Eagle3(head_config(target.config, len(self.vocabulary)))
        start_from_dense(self.head, dense)
        self.head.to(device).train()
        self.optimizers = Optimizers(self.head, MUON_RATE, NORM_RATE)
        self.unseen = self.lessons.without(mixed(texts["train"], SEED))
        if not self.unseen and not self.lessons.tokens:
            raise ValueError("expected texts to train on, got none that are long enough")
        self.steps, self.begun = 0, 0.0
        self.budget = budget
        self.rows = target.get_output_embeddings().weight[self.vocabulary].to(torch.bfloat16)
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
            annotated(self.target, group, layers, self.device)
            for group in grouped(rows, BATCH_TOKENS)
        ]

    def annotate(self) -> None:
        """Have the target read rows that it has not read, as far as the budget goes.

        Some of them even if it does not: there is nothing to learn from otherwise.
        """
        for start in tqdm(range(0, len(self.unseen), PART_ROWS), desc="annotating", unit="part"):
            if self.lessons.tokens and self.budget.progress > ANNOTATING:
                break
            part = self.unseen[start : start + PART_ROWS]
            self.lessons.append(self.annotated(part), self.rows)
        self.unseen = []
        if not self.steps:
            self.begun = self.budget.progress

    def train(self) -> Eagle3:
        """Spend the budget; the held-out acceptance at every checkpoint goes to the log."""
        self.annotate()
        losses: list[float] = []
        saved = self.budget.seconds
        self.report(losses)
        while self.budget.progress < 1.0:
            for lesson in self.lessons.epoch(BATCH_TOKENS, SEED + self.steps, self.device):
                losses.append(self.step(lesson))
                if self.budget.progress == 1.0:
                    break
                if self.budget.seconds - saved > 60 * MINUTES_BETWEEN_CHECKPOINTS:
                    self.save()
                    self.report(losses)
                    losses, saved = [], self.budget.seconds
        self.save()
        self.report(losses)
        return self.head.eval()

    def step(self, lesson: Lesson) -> float:
        """One update; under autocast the optimizer's own products are in bf16, too."""
        learned = (self.budget.progress - self.begun) / (1 - self.begun)
        # Shallow first: deeper depths only make sense once the first one predicts something.
        depths = 1 + sum(learned > place for place in DEEPER)
        with torch.autocast(self.device, torch.bfloat16):
            embedding = self.target.get_input_embeddings().weight
            loss = head_loss(self.head, lesson, embedding, self.rows, depths)
            loss.backward()
            decay_from = self.begun + DECAY_FROM * (1 - self.begun)
            self.optimizers.step(self.budget.lr_factor(0.0, decay_from))
        self.steps += 1
        self.budget.tokens_done += int(lesson.counted.sum())
        return loss.item()

    def report(self, losses: list[float]) -> None:
        """Print and log minutes, tokens, loss and each domain's held-out acceptance."""
        parts = [
            f"{self.budget.seconds / 60:.1f} min",
            f"{self.budget.tokens_done} tokens",
            f"loss {mean(losses or [math.nan]):.3f}",
        ]
        self.head.eval()
        for domain, batches in self.held_out.items():
            got = acceptance(self.head, self.target, self.vocabulary, batches, DRAFTS)
            depths = " ".join(f"{rate:.2f}" for rate in got.by_depth)
            parts.append(f"{domain} alpha {got.alpha:.3f} ({depths}) sampled {got.sampled:.3f}")
        self.head.train()
        line = " · ".join(parts)
        print(line, flush=True)
        with (self.folder / "eagle.log").open("a") as log:
            log.write(line + "\n")

    def save(self) -> None:
        """Write the checkpoint; an interrupted writing leaves the one before."""
        state = {
            "head": self.head.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "steps": self.steps,
            "begun": self.begun,
            "tokens": self.budget.tokens_done,
            "seconds": self.budget.seconds,
        }
        save_checkpoint(state, self.checkpoint)

    def restore(self) -> None:
        """Go on from the checkpoint."""
        state = load_checkpoint(self.checkpoint)
        self.head.load_state_dict(state["head"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.steps, self.begun = state["steps"], state["begun"]
        self.budget.tokens_done, self.budget.seconds_before = state["tokens"], state["seconds"]

    def export(self, out: Path) -> None:
        """Write the head in the published layout."""
        save_head(self.head, self.vocabulary, self.target.get_output_embeddings().weight, out)

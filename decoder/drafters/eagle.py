"""EAGLE drafting: one small head that reads the target's features and extends them by itself.

A P-EAGLE head does so in one pass: from the second drafted token on it reads a mask token beside
a feature that it has learned, instead of what it has drafted and predicted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from decoder.errors import UserError
from decoder.model.kernels import accelerate, ragged_attention_op
from decoder.model.rope import looks_at_positions

from .chain import DraftChain, Texts
from .features import FeatureDrafter
from .heads.eagle_config import EagleCheckpoint
from .heads.eagle_head import EagleHead
from .heads.eagle_loader import load_eagle

if TYPE_CHECKING:
    from decoder.model.runner import ModelRunner
    from decoder.sampling import Sampler


class EagleDrafter(FeatureDrafter):
    """Chain drafting with an EAGLE-1 or EAGLE-3 head.

    Args:
        checkpoint: a loaded head or the directory of one.
        kernels: let ``moesd_kernels`` run the head's linear layers and norms.
    """

    what = "EAGLE head"

    def __init__(self, checkpoint: EagleCheckpoint | str | Path, *, kernels: bool = False) -> None:
        if not isinstance(checkpoint, EagleCheckpoint):
            checkpoint = load_eagle(checkpoint)
        self.checkpoint = checkpoint
        self._kernels = kernels
        self.name = checkpoint.config.kind
        self.hidden_layers = checkpoint.config.feature_layers

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        model = runner.model
        depth = model.config.get_text_config().num_hidden_layers
        self.hidden_layers = self.hidden_layers or (2, depth // 2, depth - 3)
        if any(not -depth - 1 <= layer <= depth for layer in self.hidden_layers):
            raise UserError(
                f"the EAGLE head reads hidden states {self.hidden_layers} of a target with "
                f"{depth} layers"
            )
        embedding = model.get_input_embeddings().weight
        self.head = EagleHead(self.checkpoint, embedding, model.get_output_embeddings()).eval()
        if self._kernels:
            accelerate(self.head)
        width = len(self.hidden_layers) * model.config.get_text_config().hidden_size
        if self.head.feature_size != width:
            raise UserError(
                f"the EAGLE head expects features of width {self.head.feature_size}, the target's "
                f"hidden states {self.hidden_layers} make {width}"
            )
        self._check_vocabulary(sampler.vocab_size)
        own = self.checkpoint.config.rope.get("max_position_embeddings", runner.max_length)
        self._attach(
            *(runner, sampler, max_gamma, [self.head]),
            width=width,
            positions=own,
            attention=ragged_attention_op(embedding.device, embedding.dtype),
            capturable=not looks_at_positions(self.head),
        )

    def _check_vocabulary(self, vocab_size: int) -> None:
        mapping, mask = self.checkpoint.draft_to_target, self.checkpoint.config.mask_token
        if mapping is not None and int(mapping.max()) >= vocab_size:
            raise UserError(
                f"the EAGLE head's d2t reaches token {int(mapping.max())}, the target has "
                f"{vocab_size}"
            )
        if mask is not None and mask >= self.head.embedding.shape[0]:
            raise UserError(
                f"the EAGLE head's mask token is {mask}, its embedding has "
                f"{self.head.embedding.shape[0]} tokens"
            )

    def _draft(self, chain: DraftChain, gamma: int, W: int, texts: Texts) -> None:
        mask, more = self.checkpoint.config.mask_token, gamma - 1
        if mask is None:
            super()._draft(chain, gamma, W, texts)
            return
        reach, _, rows, lengths = texts
        tokens, live = self._window(0, W, texts, chain.drawn)
        ahead = lengths[:, None] + torch.arange(more, device=rows.device)
        masked = self.head.masked.expand(len(rows), more, -1)
        hidden = self._forward(
            0,
            torch.cat([tokens, torch.full_like(ahead, mask)], dim=1),
            torch.cat([self._waiting(W, texts), masked], dim=1),
            rows,
            torch.cat([live, reach.place(ahead, more - 1)], dim=1),
            reach.length(more - 1),
        )
        logits = self._logits(0, hidden[:, W - 1 :])
        for step in range(gamma):
            chain.draw(logits[:, step : step + 1])

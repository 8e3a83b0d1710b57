"""Drafting with the multi-token-prediction heads that a target's checkpoint carries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from decoder.errors import UserError
from decoder.model.kernels import accelerate
from decoder.model.loading import context_length
from decoder.model.rope import looks_at_positions

from .features import FeatureDrafter
from .heads.mtp_loader import load_mtp

if TYPE_CHECKING:
    from decoder.model.runner import ModelRunner
    from decoder.sampling import Sampler


class MtpDrafter(FeatureDrafter):
    """Chain drafting with one head applied again and again, or with several in turn.

    Args:
        folder: where the heads' tensors are; ``None`` is where the target was loaded from.
        kernels: let ``moesd_kernels`` run the heads' experts, linear layers and norms.
    """

    name = "mtp"
    what = "MTP head"
    hidden_layers = (-1,)  # after the final norm

    def __init__(self, folder: str | Path | None = None, *, kernels: bool = False) -> None:
        self.folder = folder
        self._kernels = kernels

    def bind(self, runner: ModelRunner, sampler: Sampler, max_gamma: int) -> None:
        model = runner.model
        folder = self.folder or model.config.name_or_path
        if not folder:
            raise UserError(
                "drafter 'mtp' reads heads beside the target's weights, and this target comes from "
                "no folder: name one as draft"
            )
        self.heads = load_mtp(folder, model)
        for head in self.heads if self._kernels else ():
            accelerate(head.base)
            accelerate(head.around)
        self._attach(
            *(runner, sampler, max_gamma, self.heads),
            width=runner.config.hidden_size,
            positions=context_length(model),
            attention=runner.attention_op,
            capturable=not any(map(looks_at_positions, self.heads)),
        )

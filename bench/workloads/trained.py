"""Trained pairs: a target whose text can be read, and what drafts for it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from decoder.drafters.heads.eagle_loader import is_eagle_checkpoint, load_eagle
from decoder.drafters.table import canonical_name, drafter_kind
from decoder.model.loading import load_model, load_tokenizer

# Packages with ``target_path()`` and ``draft_of(drafter)``, imported when one is asked for.
PAIRS = {"smol": "decoder.smol", "embedded": "decoder.embedded"}


@dataclass(frozen=True, slots=True)
class TrainedPair:
    """A target and what drafts for it, not loaded.

    Attributes:
        name: of the pair, in lines.
        drafter: name in ``decoder.drafters.DRAFTERS``.
        target: the target's folder or GGUF file, with its tokenizer.
        draft: folder of what the drafter reads, or None.
    """

    name: str
    drafter: str
    target: Path
    draft: Path | None

    @classmethod
    def of_preset(cls, name: str, drafter: str) -> TrainedPair:
        """The pair of a name in ``PAIRS``, built first where it is built at its first use.

        Raises:
            UserError: it cannot be had here, and why.
        """
        package = importlib.import_module(PAIRS[name])
        target, draft = package.target_path(), package.draft_of(canonical_name(drafter))
        return cls(name, drafter_kind(drafter, draft).name, Path(target), draft)

    def load_target(self, dtype: torch.dtype, device: torch.device | str) -> Any:
        """The target."""
        disable_progress_bar()
        return load_model(self.target, dtype=dtype, device=device)

    def load_draft(self, target: Any) -> Any:
        """A draft model, an ``EagleCheckpoint``, or the drafter's name where it reads neither."""
        if self.draft is None:
            return self.drafter
        if is_eagle_checkpoint(self.draft):
            return load_eagle(self.draft)
        return load_model(self.draft, dtype=target.dtype, device=target.device)

    def load_tokenizer(self) -> Any:
        """The target's tokenizer."""
        return load_tokenizer(self.target)

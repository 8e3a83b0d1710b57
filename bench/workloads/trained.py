"""Trained pairs: a target whose text can be read, and what drafts for it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from bench.workloads.models import require_known_format
from decoder.builtin import BUILTIN
from decoder.drafters.heads.eagle_loader import is_eagle_checkpoint, load_eagle
from decoder.drafters.table import canonical_name, drafter_kind
from decoder.model.loading import DTYPES, load_model, load_tokenizer


@dataclass(frozen=True, slots=True)
class TrainedPair:
    """A target and what drafts for it, not loaded.

    Attributes:
        name: of the pair, in lines.
        drafter: name in ``decoder.drafters.DRAFTERS``.
        target: the target's folder or GGUF file, with its tokenizer.
        draft: folder or GGUF file of what the drafter reads, or None.
    """

    name: str
    drafter: str
    target: Path
    draft: Path | None

    @classmethod
    def of_preset(cls, name: str, drafter: str, **run: Any) -> TrainedPair:
        """The pair of a name in ``BUILTIN``, built first where it is built at its first use.

        Args:
            name: of the pair.
            drafter: name or alias.
            run: how the draft will run, as ``draft_of`` of the pair's package is told; without,
                whatever runs it can read the draft.

        Raises:
            UserError: it cannot be had here, and why.
        """
        package = BUILTIN[name]
        target, draft = package.target_path(), package.draft_of(canonical_name(drafter), **run)
        return cls(name, drafter_kind(drafter, draft).name, Path(target), draft)

    @classmethod
    def of_flags(cls, args: argparse.Namespace) -> TrainedPair:
        """The pair of ``--preset`` and ``--drafter``, to run here on our kernels."""
        dtype = DTYPES[args.dtype]
        run = {"device": args.device, "dtype": dtype, "kernels": True}
        return cls.of_preset(args.preset, args.drafter, **run)

    def load_target(self, dtype: torch.dtype, device: torch.device | str) -> Any:
        """The target; ValueError as of ``require_known_format``."""
        disable_progress_bar()
        target = load_model(self.target, dtype=dtype, device=device)
        return require_known_format(target, self.target)

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

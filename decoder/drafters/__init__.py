"""Drafters: who proposes the tokens that the target verifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decoder.errors import UserError

from .base import Drafter
from .ngram import HybridDrafter, NgramDrafter
from .none import NoDrafter
from .replay import ReplayDrafter
from .self_draft import SelfDrafter

__all__ = [
    "KINDS",
    "Drafter",
    "HybridDrafter",
    "NgramDrafter",
    "NoDrafter",
    "ReplayDrafter",
    "SelfDrafter",
    "build_drafter",
]

KINDS = ("none", "ngram", "self", "independent", "eagle")


def build_drafter(
    spec: Any,
    target: Any,
    tokenizer: Any | None = None,
    *,
    kind: str = "auto",
    draft_tokenizer: Any | None = None,
    self_top_k: int | None = None,
    max_ngram: int = 4,
    min_ngram: int = 2,
    ngram_threshold: int | None = None,
    kernels: bool = True,
) -> Drafter:
    """Make a drafter from a name, a path, a model or a drafter.

    Args:
        spec: ``None`` or ``"none"``, ``"ngram"``, ``"self"``, the directory of an EAGLE head or of
            a language model, a loaded transformers model, or a drafter, which is returned as is.
        target: the target model, for the dtype and device of what is loaded.
        tokenizer: of the target, to compare vocabularies with an independent draft model.
        kind: what a path holds: ``"independent"``, ``"eagle"``, or ``"auto"`` to look.
        draft_tokenizer: of a draft model given as an object; a path brings its own.
        self_top_k: experts per token while the target drafts for itself; ``None`` takes half.
        max_ngram: longest suffix for the n-gram lookup.
        min_ngram: shortest.
        ngram_threshold: override a model drafter where at least this many tokens repeat.
        kernels: let ``moesd_kernels`` accelerate the draft model or head.

    Raises:
        UserError: unknown name, missing path, or a checkpoint that cannot be used.
    """
    if kind not in ("auto", *KINDS):
        raise UserError(f"drafter kind must be one of auto, {', '.join(KINDS)}, got {kind!r}")
    drafter: Drafter
    name = spec if isinstance(spec, str) and spec in KINDS else kind
    if spec is None or name == "none":
        return NoDrafter()
    if isinstance(spec, Drafter):
        drafter = spec
    elif name == "ngram":
        return NgramDrafter(max_ngram, min_ngram)
    elif name == "self":
        drafter = SelfDrafter(self_top_k)
    elif isinstance(spec, (str, Path)):
        drafter = _from_path(spec, target, tokenizer, kind, kernels)
    else:
        drafter = _independent(spec, draft_tokenizer, tokenizer, kernels)
    if ngram_threshold is None:
        return drafter
    return HybridDrafter(drafter, NgramDrafter(ngram_threshold, ngram_threshold), ngram_threshold)


def _from_path(
    spec: str | Path, target: Any, tokenizer: Any | None, kind: str, kernels: bool
) -> Drafter:
    from .eagle_loader import is_eagle_checkpoint

    if not Path(spec).is_dir():
        names = ", ".join(f"{name!r}" for name in KINDS[:3])
        raise UserError(f"draft {str(spec)!r} is neither a directory nor one of {names}")
    if kind == "eagle" or (kind == "auto" and is_eagle_checkpoint(spec)):
        from .eagle import EagleDrafter

        return EagleDrafter(spec, kernels=kernels)
    from decoder.model.loading import load_model, load_tokenizer

    weight = target.get_input_embeddings().weight
    model = load_model(spec, dtype=weight.dtype, device=weight.device)
    try:
        own_tokenizer = load_tokenizer(spec)
    except UserError:
        own_tokenizer = None  # equal vocabulary sizes are then the only evidence there is
    return _independent(model, own_tokenizer, tokenizer, kernels)


def _independent(
    model: Any, tokenizer: Any | None, target_tokenizer: Any | None, kernels: bool
) -> Drafter:
    from decoder.model.kernels import accelerate

    from .independent import IndependentDrafter

    if not hasattr(model, "get_output_embeddings"):
        raise UserError(
            f"draft must be a name, a path, a causal LM or a Drafter, got {type(model).__name__}"
        )
    if kernels:
        accelerate(model)
    return IndependentDrafter(model, tokenizer, target_tokenizer)

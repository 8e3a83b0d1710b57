"""Drafters by name: which exist, what each is made of, and which options it reads.

The command line's choices, flags, help and errors are read from this table. Nothing is imported
for a drafter before it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from decoder.checkpoint.folder import is_gguf, model_folder
from decoder.checkpoint.gguf_tokenizer import has_gguf_tokenizer
from decoder.checkpoint.tokenizer_files import has_tokenizer
from decoder.errors import UserError

from .base import Drafter
from .ngram import HybridDrafter, NgramDrafter
from .none import NoDrafter
from .replay import ReplayDrafter
from .self_draft import SelfDrafter
from .suffix import SuffixDrafter

AUTO = "auto"  # what the draft is, or n-gram lookup without one


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """What may be said about drafting. Each kind reads those that its entry in ``DRAFTERS`` names.

    Attributes:
        self_top_k: experts per token while the target drafts for itself; ``None`` takes half.
        max_ngram: longest suffix for the n-gram lookup.
        min_ngram: shortest.
        max_tree_depth: longest suffix for the suffix lookup.
        max_cached_requests: finished sequences that it looks in.
        max_spec_factor: its longest proposal, as a multiple of the suffix found.
        min_token_prob: share of what followed before from which it proposes.
        ngram_threshold: let the n-gram lookup override a model where this many tokens repeat.
        replay_alpha: acceptance rate that replay imposes.
        weight_format: store a draft model's matrices as "int8" or "int4": it proposes sooner, and
            maybe other tokens, which the target verifies all the same; ``None`` leaves them.
        kernels: let ``moesd_kernels`` run the draft model or head.
        tokenizer: of the target, to compare vocabularies with an independent draft model.
    """

    self_top_k: int | None = None
    max_ngram: int = 4
    min_ngram: int = 2
    max_tree_depth: int = 24
    max_cached_requests: int = 10_000
    max_spec_factor: float = 1.0
    min_token_prob: float = 0.1
    ngram_threshold: int | None = None
    replay_alpha: float = 0.9
    weight_format: str | None = None
    kernels: bool = True
    tokenizer: Any = None


# (draft, target, options): a folder, a loaded draft or None; the loaded target.
Factory = Callable[[Any, Any, DraftOptions], Drafter]


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """How drafters of one kind are made.

    Attributes:
        name: its public name.
        summary: what it proposes, in a few words, for the command line's help.
        make: makes one; imports what that needs.
        aliases: what others call it.
        draft: whether it takes a draft, a path or something loaded: if not, one is refused.
        options: the fields of ``DraftOptions`` that a user sets for it.
    """

    name: str
    summary: str
    make: Factory
    aliases: tuple[str, ...] = ()
    draft: Literal["none", "optional", "required"] = "none"
    options: tuple[str, ...] = ()


def _make_independent(draft: Any, target: Any, options: DraftOptions) -> Drafter:
    from decoder.model.kernels import accelerate, gguf_file, quantized
    from decoder.model.support import hidden_dtype

    from .independent import IndependentDrafter, with_own_modules

    tokenizer = None  # equal vocabulary sizes are the only evidence there is without one
    loaded = not isinstance(draft, Path)
    if not loaded:
        from decoder.model.loading import load_model, load_tokenizer, require_fitting_tokenizer

        device, dtype = target.get_input_embeddings().weight.device, hidden_dtype(target)
        model = load_model(draft, dtype=dtype, device=device, packed=options.kernels)
        if has_gguf_tokenizer(gguf_file(draft)) if is_gguf(draft) else has_tokenizer(draft):
            tokenizer = load_tokenizer(draft)
            require_fitting_tokenizer(tokenizer, model)
        draft = model
    if not hasattr(draft, "get_output_embeddings"):
        raise UserError(f"draft must be a path or a causal LM, got {type(draft).__name__}")
    if options.weight_format is not None:  # a model that was given stays its owner's
        draft = quantized(with_own_modules(draft) if loaded else draft, options.weight_format)
    hasten = options.kernels and (not loaded or options.weight_format is not None)
    if options.kernels and not hasten:
        accelerate(draft)
    return _with_lookup(IndependentDrafter(draft, tokenizer, options.tokenizer, hasten), options)


def _make_eagle(draft: Any, target: Any, options: DraftOptions) -> Drafter:
    from .eagle import EagleDrafter

    return _with_lookup(EagleDrafter(draft, kernels=options.kernels), options)


def _make_mtp(draft: Any, target: Any, options: DraftOptions) -> Drafter:
    from .mtp import MtpDrafter

    if draft is not None and not isinstance(draft, Path):
        raise UserError(f"the draft of 'mtp' must be a folder, got {type(draft).__name__}")
    return _with_lookup(MtpDrafter(draft, kernels=options.kernels), options)


def _make_suffix(draft: Any, target: Any, options: DraftOptions) -> Drafter:
    return SuffixDrafter(
        options.max_tree_depth,
        options.max_cached_requests,
        options.max_spec_factor,
        options.min_token_prob,
    )


def _make_self(draft: Any, target: Any, options: DraftOptions) -> Drafter:
    return _with_lookup(SelfDrafter(options.self_top_k), options)


def _make_replay(draft: Any, target: Any, options: DraftOptions) -> Drafter:
    cost = None if draft is None else _kind_of(draft).make(draft, target, options)
    return ReplayDrafter(options.replay_alpha, cost=cost)


def _with_lookup(drafter: Drafter, options: DraftOptions) -> Drafter:
    threshold = options.ngram_threshold
    return drafter if threshold is None else HybridDrafter(drafter, threshold=threshold)


_MTP_FAMILIES = "deepseek", "glm4_moe", "qwen3_next", "qwen3_5", "mimo", "ernie"  # vLLM's names

DRAFTERS = {
    kind.name: kind
    for kind in (
        DrafterKind("none", "plain decoding", lambda draft, target, options: NoDrafter()),
        DrafterKind(
            "ngram",
            "what followed these tokens before",
            lambda draft, target, options: NgramDrafter(options.max_ngram, options.min_ngram),
            options=("max_ngram", "min_ngram"),
        ),
        DrafterKind(
            "suffix",
            "what followed these tokens before, in any sequence",
            _make_suffix,
            aliases=("suffix_decoding",),
            options=(
                "max_tree_depth",
                "max_cached_requests",
                "max_spec_factor",
                "min_token_prob",
            ),
        ),
        DrafterKind(
            "self",
            "the target with fewer experts",
            _make_self,
            options=("self_top_k", "ngram_threshold"),
        ),
        DrafterKind(
            "independent",
            "a smaller model",
            _make_independent,
            aliases=("draft_model",),
            draft="required",
            options=("ngram_threshold", "weight_format"),
        ),
        DrafterKind(
            "eagle",
            "a head on the target's features",
            _make_eagle,
            aliases=("eagle3",),
            draft="required",
            options=("ngram_threshold",),
        ),
        DrafterKind(
            "mtp",
            "the heads that the target's checkpoint carries, or a folder",
            _make_mtp,
            aliases=tuple(f"{family}_mtp" for family in _MTP_FAMILIES),
            draft="optional",
            options=("ngram_threshold",),
        ),
        DrafterKind(
            "replay",
            "a recorded output, to measure with; a draft runs for its cost alone",
            _make_replay,
            draft="optional",
            options=("replay_alpha",),
        ),
    )
}
_ALIASES = {alias: kind.name for kind in DRAFTERS.values() for alias in kind.aliases}


def drafter_names() -> list[str]:
    """Every name that ``build_drafter`` knows, aliases too."""
    return [AUTO, *DRAFTERS, *_ALIASES]


def canonical_name(name: str) -> str:
    """The name in ``DRAFTERS`` of an alias; any other name as it is."""
    return _ALIASES.get(name, name)


def drafter_kind(name: str, draft: Any = None) -> DrafterKind:
    """The entry of a name or alias; of ``"auto"``, what the draft is, or n-gram without one.

    Raises:
        UserError: unknown name.
    """
    if name == AUTO:
        return DRAFTERS["ngram"] if draft is None else _kind_of(draft)
    kind = DRAFTERS.get(canonical_name(name))
    if kind is None:
        known = ", ".join(drafter_names())
        raise UserError(
            f"drafter must be one of {known}, got {name!r}; a draft model's path is given as draft"
        )
    return kind


def build_drafter(
    drafter: Any, target: Any, draft: Any = None, options: DraftOptions | None = None
) -> Drafter:
    """Make a drafter.

    Args:
        drafter: a name or alias of ``DRAFTERS``, or ``"auto"``: what ``draft`` is, or n-gram
            lookup without one. Also a ``Drafter``, which is returned as is, ``None`` for none, or
            a loaded draft model, as if given as ``draft``.
        target: the loaded target, for the dtype and device of what is loaded.
        draft: directory or hub name of a draft model or of heads, or one that is loaded.
        options: see ``DraftOptions``.

    Raises:
        UserError: unknown name, missing path, or a checkpoint that cannot be used.
    """
    if drafter is None or isinstance(drafter, Drafter):
        return checked_drafter(drafter)
    if not isinstance(drafter, str):
        drafter, draft = AUTO, drafter
    if isinstance(draft, (str, Path)):
        draft = Path(draft) if is_gguf(draft) else model_folder(draft, "draft")
    kind = drafter_kind(drafter, draft)
    if kind.draft == "none" and draft is not None:
        got = str(draft) if isinstance(draft, Path) else type(draft).__name__
        raise UserError(f"drafter {drafter!r} takes no draft, got {got!r}")
    if kind.draft == "required" and draft is None:
        raise UserError(f"drafter {drafter!r} needs a draft (--draft), got none")
    return kind.make(draft, target, options or DraftOptions())


def checked_drafter(drafter: Drafter | None) -> Drafter:
    """What a decoder may be given: a ``Drafter``, or ``None`` for none.

    Raises:
        UserError: anything else, such as the path of one; says what makes a drafter of it.
    """
    if drafter is None or isinstance(drafter, Drafter):
        return drafter or NoDrafter()
    raise UserError(
        f"drafter must be a Drafter or None, got {type(drafter).__name__}; "
        "SpeculativeDecoder.from_paths takes paths, decoder.drafters.build_drafter names and models"
    )


def _kind_of(draft: Any) -> DrafterKind:
    """What a draft is: a directory is looked into."""
    from .heads.eagle_config import EagleCheckpoint
    from .heads.eagle_loader import is_eagle_checkpoint

    is_path = isinstance(draft, Path)
    if is_path and is_gguf(draft):
        return DRAFTERS["independent"]
    is_head = is_eagle_checkpoint(draft) if is_path else isinstance(draft, EagleCheckpoint)
    return DRAFTERS["eagle" if is_head else "independent"]

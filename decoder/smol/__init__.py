"""The real model: SmolLM2-135M-Instruct made sparse, its dense draft and room for an EAGLE-3 head.

``MODEL_CARD.md`` says what it is. The repository holds what makes it different from the dense
model (``assets``), a package from the index holds that one, and the folders are built from both
into the cache when they are first asked for. Importing this package loads and builds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from decoder.checkpoint.folder import read_json
from decoder.model.kernels import multiplies_integers
from decoder.model.loading import DTYPES, default_device

from .build import folder_of
from .recipe import Part, shipped
from .tuned import TUNED_FILE


def unavailable() -> str | None:
    """Why the target cannot be had here, in one line, or ``None``; builds nothing."""
    return shipped().missing("target")


def target_path() -> Path:
    """Directory of the MoE target and tokenizer, for plain ``from_pretrained``.

    Raises:
        UserError: it is not there and cannot be built; so of the others.
    """
    return _built("target")


def draft_path() -> Path:
    """Directory of the dense draft and tokenizer, for ``AutoModelForCausalLM.from_pretrained``.

    Its weights as a GGUF file are in there, too, where they are not the package's own.
    """
    return _built("draft")


def eagle_path() -> Path:
    """Directory of the EAGLE-3 head, in its published layout."""
    return _built("eagle")


def has_eagle() -> bool:
    """Whether the repository holds an EAGLE-3 head."""
    asset = shipped().asset("eagle")
    return asset is not None and asset.is_file()


def draft_of(
    drafter: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    kernels: bool = False,
) -> Path | None:
    """What a drafter of this name reads, of those in ``decoder.drafters.DRAFTERS`` that need one.

    ``"auto"`` is the draft model. On a CPU that multiplies integers (AVX-512-VNNI), in bf16 and on
    our kernels it runs from its GGUF file: a step reads the file's blocks, about a third of the
    bytes of the same weights in bf16, or int8 made of them where a batch fills AMX tiles.
    Everything else takes the folder of plain weights.

    Args:
        drafter: its name.
        device: where the draft will run; CUDA when there is one, by default.
        dtype: of its hidden states, or a name in ``DTYPES``; ``"auto"`` is bf16.
        kernels: whether ours will run it, with the weights as they are stored.

    Returns:
        A GGUF file or a folder; ``None`` for drafters that need nothing.

    Raises:
        UserError: it is not there and cannot be built.
    """
    if drafter == "eagle":
        return eagle_path()
    if drafter not in ("auto", "independent"):
        return None
    packed = (
        kernels
        and torch.device(device or default_device()).type == "cpu"
        and DTYPES.get(str(dtype), dtype) in ("auto", torch.bfloat16)
        and multiplies_integers()
    )
    return (packed and _draft_file()) or draft_path()


def stated_alphas() -> dict[str, Any]:
    """Acceptance by drafter, kind of prompt and temperature, as measured for the card."""
    record = shipped().record
    return dict(read_json(record).get("alpha", {})) if record.exists() else {}


def _draft_file() -> Path | None:
    """The draft in GGUF; ``None`` where it was the package's, which is there no more."""
    recipe = shipped()
    if recipe.asset("draft") is not None:
        return draft_path() / TUNED_FILE
    return recipe.file if recipe.unreadable() is None else None


def _built(part: Part) -> Path:
    return folder_of(shipped(), part)

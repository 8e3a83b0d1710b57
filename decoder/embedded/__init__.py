"""The trained pair that ships with the package: MoE target, dense draft, EAGLE head, tokenizer.

A demonstration and test model (see ``MODEL_CARD.md``): it makes ``python -m decoder`` do its real
job with no network and no GPU. Importing this package loads nothing; ``load_pair`` imports
transformers when it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from decoder.errors import UserError

ASSETS = Path(__file__).parent / "assets"
# See ``stated_alphas``.
ALPHA = {
    "independent": {"code": {"0": 0.968, "1": 0.667}, "prose": {"0": 0.916, "1": 0.625}},
    "eagle": {"code": {"0": 0.95, "1": 0.68}, "prose": {"0": 0.90, "1": 0.63}},
}


def target_path() -> Path:
    """Directory of the MoE target and tokenizer, for plain ``from_pretrained``."""
    return _existing("target")


def draft_path() -> Path:
    """Directory of the dense draft, for ``AutoModelForCausalLM.from_pretrained``."""
    return _existing("draft")


def eagle_path() -> Path:
    """Directory of the EAGLE head (``config.json``, ``model.safetensors``; EAGLE-1's format)."""
    return _existing("eagle")


def draft_of(
    drafter: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    kernels: bool = False,
) -> Path | None:
    """What a drafter of this name reads, of those in ``decoder.drafters.DRAFTERS`` that need one.

    ``"auto"`` is the draft model; ``None`` for drafters that need nothing. The same wherever it
    will run, of which ``decoder.smol.draft_of`` is told too.
    """
    find = {"auto": draft_path, "independent": draft_path, "eagle": eagle_path}.get(drafter)
    return None if find is None else find()


def stated_alphas() -> dict[str, Any]:
    """Acceptance by drafter, kind of prompt and temperature, as MODEL_CARD.md has it."""
    return ALPHA


def load_pair(
    dtype: torch.dtype = torch.bfloat16, **target_options: Any
) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    """Load target, draft and tokenizer.

    Args:
        dtype: the weights are stored in bf16; fp32 widens them exactly.
        target_options: passed to the target's ``from_pretrained``, such as
            ``experts_implementation="moesd"``.

    Returns:
        ``(target, draft, tokenizer)``, models in evaluation mode.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target, draft = (
        AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True, **options
        ).eval()
        for path, options in ((target_path(), target_options), (draft_path(), {}))
    )
    return target, draft, AutoTokenizer.from_pretrained(target_path(), trust_remote_code=False)


def _existing(part: str) -> Path:
    path = ASSETS / part
    if not path.is_dir():
        raise UserError(
            f"expected the embedded pair's {part} in {path}, got no such directory; "
            "reinstall the package, or train the pair with `python -m training all`"
        )
    return path

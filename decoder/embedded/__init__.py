"""The trained pair that ships with the package: MoE target, dense draft, EAGLE head, tokenizer.

A demonstration and test model (see ``MODEL_CARD.md``): it makes ``python -m decoder`` do its real
job with no network and no GPU. Importing this package loads nothing; ``load_pair`` imports
transformers when it is called.
"""

from pathlib import Path
from typing import Any

import torch

ASSETS = Path(__file__).parent / "assets"


def target_path() -> Path:
    """Directory of the MoE target and tokenizer, for plain ``from_pretrained``."""
    return _existing("target")


def draft_path() -> Path:
    """Directory of the dense draft, for ``AutoModelForCausalLM.from_pretrained``."""
    return _existing("draft")


def eagle_path() -> Path:
    """Directory of the EAGLE head (``config.json``, ``model.safetensors``; EAGLE-1's format)."""
    return _existing("eagle")


def load_pair(
    dtype: torch.dtype = torch.bfloat16, **target_options: Any
) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    """Load target, draft and tokenizer.

    Args:
        dtype: the weights are stored in bf16; fp32 widens them exactly. target_options: passed to
        the target's ``from_pretrained``, such as ``experts_implementation="moesd"``.

    Returns:
        ``(target, draft, tokenizer)``, models in evaluation mode.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = AutoModelForCausalLM.from_pretrained(
        target_path(), dtype=dtype, **target_options
    ).eval()
    draft = AutoModelForCausalLM.from_pretrained(draft_path(), dtype=dtype).eval()
    return target, draft, AutoTokenizer.from_pretrained(target_path())


def _existing(part: str) -> Path:
    path = ASSETS / part
    if not path.is_dir():
        raise FileNotFoundError(
            f"expected the embedded pair's {part} in {path}, got no such directory; "
            "reinstall the package, or train the pair with `python -m training all`"
        )
    return path

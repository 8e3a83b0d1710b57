"""Models and tokenizers from paths, with errors that fit on one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from decoder.errors import UserError

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    experts: str | None = None,
) -> Any:
    """A causal LM in evaluation mode.

    Args:
        path: directory, or a model hub name that transformers can resolve.
        dtype: a torch dtype or a name in ``DTYPES``; ``"auto"`` is the checkpoint's own.
        device: CUDA when there is one, by default.
        experts: transformers' ``experts_implementation``, or its default.

    Raises:
        UserError: nothing loadable there, or an unknown dtype.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    _require_present(path, "model")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        options = {} if experts is None else {"experts_implementation": experts}
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[dtype] if isinstance(dtype, str) else dtype, **options
        )
        return model.to(device).eval()
    # Torch without CUDA asserts that there is none.
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise UserError(f"cannot load model {str(path)!r}: {_first_line(error)}") from error


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer next to a model.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    _require_present(path, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load tokenizer {str(path)!r}: {_first_line(error)}") from error


def eos_ids(model: Any) -> frozenset[int]:
    """End-of-sequence ids: of the generation config, else of the model config."""
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def context_length(model: Any) -> tuple[int, bool]:
    """The model's context, and whether it is a table of positions that cannot be exceeded."""
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None) or 2**15
    return int(length), getattr(config, "rope_parameters", None) is None


def _require_present(path: str | Path, what: str) -> None:
    text = str(path)
    # "owner/name" may be a hub name; anything else that does not exist is a mistyped path.
    could_be_hub_name = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if not Path(path).exists() and not could_be_hub_name:
        raise UserError(f"{what} path {text!r} does not exist")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

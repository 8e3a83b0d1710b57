"""Which transformers models can run over a ragged cache, and their attention settings."""

from __future__ import annotations

from typing import Any

import torch

from decoder.errors import UserError

_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


def check_loaded(model: Any) -> None:
    """Refuse a path where a model is expected.

    Raises:
        UserError: ``model`` is no transformers model; says what loads one.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise UserError(
            f"target must be a loaded causal LM, got {type(model).__name__} {str(model)[:80]!r}; "
            "SpeculativeDecoder.from_paths loads one"
        )


def check_supported(model: Any) -> None:
    """Refuse models whose past cannot be rolled back by masking.

    Raises:
        UserError: recurrent, chunked or encoder-decoder architectures.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder model; expected a decoder-only causal LM")
    layers = set(getattr(config, "layer_types", None) or ())
    exotic = sorted(layers - _SUPPORTED_LAYERS)
    if exotic or getattr(model, "_is_stateful", False):
        kinds = ", ".join(exotic) or "recurrent state"
        raise UserError(
            f"{name} has {kinds} layers, whose state cannot be rolled back when drafted tokens are "
            f"rejected; supported are {' and '.join(sorted(_SUPPORTED_LAYERS))}"
        )
    if model.get_output_embeddings() is None:
        raise UserError(f"{name} has no language-model head; expected a causal LM")


def attention_configs(model: torch.nn.Module) -> list[Any]:
    """Every distinct config object that a module of ``model`` reads its attention choice from."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [c for c in found.values() if hasattr(c, "_attn_implementation_internal")]

"""What transformers reports of the weights it found for a model, and which of it is a fault.

A report (``found``) has ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from decoder.errors import UserError

from .folder import CONFIG
from .mtp_layouts import mtp_heads
from .weights import few


def require_every_weight(folder: Path, found: dict[str, Any]) -> None:
    """Refuse weights that are missing, left over or of another shape.

    transformers leaves out of its lists what a family may lack or bring in excess: tied heads,
    buffers, layers for multi-token prediction.
    """
    shapes = {
        f"{name} {tuple(got)} for {tuple(want)}" for name, got, want in found["mismatched_keys"]
    }
    faults = {
        "missing": found["missing_keys"],
        "left over": found["unexpected_keys"],
        "of another shape": shapes,
    }
    said = [f"{kind}: {few(names)}" for kind, names in faults.items() if names]
    if said:
        raise UserError(f"the weights in {folder} are not those of its {CONFIG}; {'; '.join(said)}")


def without_other_parts(found: dict[str, Any], model: Any) -> dict[str, Any]:
    """A model that also sees or hears has weights of parts that a causal LM leaves out.

    What remains are layers of the model's own that it has no place for.
    """
    modules = {name for name, _ in model.named_modules()}
    left = {
        name
        for name in found["unexpected_keys"]
        if f"{name.partition('.layers.')[0]}.layers" in modules
    }
    return found | {"unexpected_keys": left}


def without_heads(found: dict[str, Any], model: Any, names: Collection[str]) -> dict[str, Any]:
    """Heads for multi-token prediction are read by the drafter that asks for them."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    heads = mtp_heads(names, depth)
    if heads is None:
        return found
    layout, tensors = heads
    own = {name for head in tensors for name in head.values()}
    layers = tuple(layout.layer.format(i=i, layer=depth + i) for i in range(len(tensors)))
    left = {n for n in found["unexpected_keys"] if n not in own and not n.startswith(layers)}
    return found | {"unexpected_keys": left}

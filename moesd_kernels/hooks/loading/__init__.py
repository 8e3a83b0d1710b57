"""Checkpoints whose weights stay as they are stored, where transformers would unpack them."""

from __future__ import annotations

from .gguf import load_gguf
from .keep import keep_quantized

__all__ = ["keep_quantized", "load_gguf"]

"""Checkpoints whose weights stay as they are stored, where transformers would unpack them."""

from __future__ import annotations

from .gguf import GgufFile, dense_weights, load_gguf
from .keep import keep_quantized

__all__ = ["GgufFile", "dense_weights", "keep_quantized", "load_gguf"]

"""Checkpoints whose weights stay as they are stored, where transformers would unpack them."""

from __future__ import annotations

from .gguf import GgufFile, load_gguf
from .keep import keep_quantized

__all__ = ["GgufFile", "keep_quantized", "load_gguf"]

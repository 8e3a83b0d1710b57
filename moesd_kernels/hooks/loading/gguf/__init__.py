"""GGUF files: read with care, and made models of, blocks and all."""

from __future__ import annotations

from .file import GgufFile
from .model import dense_weights, load_gguf

__all__ = ["GgufFile", "dense_weights", "load_gguf"]

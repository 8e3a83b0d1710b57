"""GGUF files: read with care, and made models of, blocks and all."""

from __future__ import annotations

from .file import GgufFile
from .model import load_gguf

__all__ = ["GgufFile", "load_gguf"]

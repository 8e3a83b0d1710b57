"""Every causal LM class of the installed transformers, tiny, and what is found for each."""

from .building import (
    CLASSES,
    CONTEXT,
    FAMILY_NAMES,
    FIRST_ORDINARY,
    NOT_BUILT,
    VOCAB,
    WINDOW,
    build,
)

__all__ = [
    "CLASSES",
    "CONTEXT",
    "FAMILY_NAMES",
    "FIRST_ORDINARY",
    "NOT_BUILT",
    "VOCAB",
    "WINDOW",
    "build",
]

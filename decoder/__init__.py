"""Batched, lossless speculative decoding on transformers models.

Legend: ``B`` live sequences, ``G`` draft length (``gamma``), ``Q = G + 1`` positions verified per
row, ``S`` positions of a cache row, ``V`` vocabulary, ``H`` hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from decoder.requests.params import SamplingParams

if TYPE_CHECKING:
    from .engine.loop import SpeculativeDecoder
    from .engine.profile_rounds import profile_rounds
    from .requests.outputs import Output, Progress
    from .requests.reader import Request

__all__ = [
    "Output",
    "Progress",
    "Request",
    "SamplingParams",
    "SpeculativeDecoder",
    "profile_rounds",
]

_HOMES = {
    "SpeculativeDecoder": "engine.loop",
    "Output": "requests.outputs",
    "Progress": "requests.outputs",
    "Request": "requests.reader",
    "profile_rounds": "engine.profile_rounds",
}


def __getattr__(name: str) -> Any:
    # Loaded on demand: `import decoder` stays quick and needs neither transformers nor a kernel.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

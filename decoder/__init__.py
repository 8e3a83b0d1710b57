"""Batched, lossless speculative decoding on transformers models.

Legend: ``B`` live sequences, ``G`` draft length (``gamma``), ``Q = G + 1`` positions verified per
row, ``S`` positions of a cache row, ``V`` vocabulary, ``H`` hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from decoder.requests.params import SamplingParams

if TYPE_CHECKING:
    from decoder.engine.loop import SpeculativeDecoder
    from decoder.engine.profile_rounds import profile_rounds
    from decoder.requests.outputs import Output

__all__ = ["Output", "SamplingParams", "SpeculativeDecoder", "profile_rounds"]

_HOMES = {
    "SpeculativeDecoder": "engine.loop",
    "Output": "requests.outputs",
    "profile_rounds": "engine.profile_rounds",
}


def __getattr__(name: str) -> Any:
    # Loaded on demand: `import decoder` stays quick and needs neither transformers nor a kernel.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

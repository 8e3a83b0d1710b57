"""A whole MoE block as one module: router, experts, and the shared expert where there is one.

For use outside transformers, or in place of a transformers block. Parameter names and layouts are
those of transformers' modules (``gate.weight``, ``experts.gate_up_proj``, …), so a block's state
dict loads as it is.
"""

from __future__ import annotations

from .config import MoEConfig
from .module import MoE

__all__ = ["MoE", "MoEConfig"]

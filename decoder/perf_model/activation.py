"""How many distinct experts a forward touches, as an exchangeable function.

The paper's i.i.d. formula over-estimates the union for consecutive tokens of one sequence, by
1.1-1.8x in every published measurement (20.4 experts measured where it says 29.1). So the models
take any ``ActiveExperts``: the formula, or the formula at an effective token count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .theory import Array, Values, active_experts, effective_tokens


class ActiveExperts(Protocol):
    """Distinct experts per layer that ``sequences`` runs of ``per_sequence`` tokens touch.

    Equal ones give equal numbers: what one was asked before is remembered.
    """

    def __call__(
        self, sequences: Values, per_sequence: Values, num_experts: int, top_k: Values
    ) -> Array: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class IidActivation:
    """Eq. 8 at ``sequences * per_sequence`` independent, uniformly routed tokens."""

    def __call__(
        self, sequences: Values, per_sequence: Values, num_experts: int, top_k: Values
    ) -> Array:
        """Distinct experts per layer."""
        tokens = np.multiply(sequences, per_sequence)
        return active_experts(tokens, num_experts, top_k)


@dataclass(frozen=True, slots=True)
class CorrelatedActivation:
    """Eq. 8 at ``sequences * per_sequence ** exponent`` effective tokens.

    Tokens of one sequence share experts; tokens of different sequences are treated as independent.
    Published single-sequence unions give exponents of 0.57-0.86, mostly near 0.78. ``skew`` does
    the same for sequences (experts popular everywhere); 1 means none.
    """

    exponent: float = 0.78
    skew: float = 1.0

    def __post_init__(self) -> None:
        for name in ("exponent", "skew"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")

    def __call__(
        self, sequences: Values, per_sequence: Values, num_experts: int, top_k: Values
    ) -> Array:
        """Distinct experts per layer."""
        tokens = np.power(sequences, self.skew) * np.power(per_sequence, self.exponent)
        return active_experts(tokens, num_experts, top_k)


def tokens_alike(
    activation: ActiveExperts, per_sequence: int, num_experts: int, top_k: int
) -> float:
    """How many neighbouring tokens of a sequence count as one independent token; at least 1."""
    active = float(activation(1, per_sequence, num_experts, top_k))
    if active >= num_experts:
        return 1.0
    return max(1.0, per_sequence / float(effective_tokens(active, num_experts, top_k)))

"""How many distinct experts a forward touches, as an exchangeable function.

The paper's i.i.d. formula over-estimates the union for consecutive tokens of one sequence, by
1.1-1.8x in every published measurement (20.4 experts measured where it says 29.1). So the models
take any ``ActiveExperts``: the formula, the formula at an effective token count, or a table.
"""

from __future__ import annotations

from collections.abc import Iterable
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


@dataclass(frozen=True, slots=True)
class Union:
    """One measured union: mean distinct experts per layer over a forward's tokens."""

    sequences: int
    per_sequence: int
    distinct: float


@dataclass(frozen=True, slots=True)
class MeasuredActivation:
    """Interpolates measured unions through their effective token counts.

    Each union becomes ``log t_eff - log t``; between measurements this offset is averaged with
    inverse-distance weights in (log sequences, log per_sequence). Unions of all experts say nothing
    about t_eff and are left out.

    Args:
        num_experts, top_k: of the model measured.
    """

    unions: tuple[Union, ...]
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if not self._usable():
            raise ValueError(
                f"unions must hold a measurement below {self.num_experts} experts, got "
                f"{len(self.unions)} measurements"
            )

    def __call__(
        self, sequences: Values, per_sequence: Values, num_experts: int, top_k: Values
    ) -> Array:
        """Distinct experts per layer."""
        usable = self._usable()
        known = np.log([[u.sequences, u.per_sequence] for u in usable])  # [n, 2]
        offsets = np.array(
            [
                np.log(effective_tokens(u.distinct, self.num_experts, self.top_k))
                - np.log(u.sequences * u.per_sequence)
                for u in usable
            ]
        )
        sequences, per_sequence = np.broadcast_arrays(sequences, per_sequence)
        asked = np.log(np.stack([sequences, per_sequence], axis=-1).astype(float))  # [..., 2]
        distance = np.square(asked[..., None, :] - known).sum(-1)  # [..., n]
        weights = 1.0 / (distance + 1e-9) ** 2
        offset = (weights * offsets).sum(-1) / weights.sum(-1)
        tokens = np.maximum(np.exp(asked.sum(-1) + np.minimum(offset, 0.0)), 1.0)
        return active_experts(tokens, num_experts, top_k)

    def _usable(self) -> list[Union]:
        return [u for u in self.unions if self.top_k <= u.distinct < 0.995 * self.num_experts]


def tokens_alike(
    activation: ActiveExperts, per_sequence: int, num_experts: int, top_k: int
) -> float:
    """How many neighbouring tokens of a sequence count as one independent token; at least 1."""
    active = float(activation(1, per_sequence, num_experts, top_k))
    if active >= num_experts:
        return 1.0
    return max(1.0, per_sequence / float(effective_tokens(active, num_experts, top_k)))


def fit_activation(unions: Iterable[Union], num_experts: int, top_k: int) -> CorrelatedActivation:
    """Least-squares ``exponent`` and ``skew`` of ``CorrelatedActivation`` in log effective tokens.

    Raises:
        ValueError: no union is informative (single tokens, or all experts active).
    """
    rows, targets, weights = [], [], []
    for union in unions:
        tokens = union.sequences * union.per_sequence
        if tokens > 1 and top_k <= union.distinct < 0.995 * num_experts:
            rows.append([np.log(union.per_sequence), np.log(union.sequences)])
            effective = float(effective_tokens(union.distinct, num_experts, top_k))
            targets.append(np.log(effective))
            # d log t_eff / d distinct explodes near full activation; weigh by its inverse
            weights.append((1.0 - union.distinct / num_experts) * effective)
    if not rows:
        raise ValueError(
            "fit_activation needs a union of several tokens below full activation, got none"
        )
    scale = np.array(weights)[:, None]
    matrix, target = np.array(rows) * scale, np.array(targets) * scale[:, 0]
    exponent, skew = 1.0, 1.0
    if matrix[:, 0].any() and matrix[:, 1].any():
        (exponent, skew), *_ = np.linalg.lstsq(matrix, target, rcond=None)
    elif matrix[:, 0].any():
        exponent = float(matrix[:, 0] @ target / (matrix[:, 0] @ matrix[:, 0]))
    else:
        skew = float(matrix[:, 1] @ target / (matrix[:, 1] @ matrix[:, 1]))
    return CorrelatedActivation(*(float(np.clip(x, 0.05, 1.0)) for x in (exponent, skew)))

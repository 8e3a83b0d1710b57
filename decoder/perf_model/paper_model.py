"""The paper's ten-parameter model of speedup (Algorithm 1) and its fit.

Speedup comes from Eq. 4, not from line 11 as printed (see ``theory.speedup_alg1_as_printed``). The
token convention is a field: ``"paper"`` charges B * gamma for a verification, as the paper did;
``"engine"`` charges B * (gamma + 1), as a measurement does.

Eq. 4 is homogeneous of degree 0 in the eight time parameters, so speedups fix them only up to a
common factor: at most nine of the ten are identifiable, and the fit says which are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from typing import Any, cast

import numpy as np

from decoder.perf_model.hardware.machine import Machine

from . import theory
from .fit_report import Identifiability, identifiability
from .model_spec import ModelSpec
from .observations import Observation, require_points

_SPAN = 5.0  # Appendix C.2: biases up to 5x the time their bytes take
_UNBOUNDED = np.inf


@dataclass(frozen=True, slots=True)
class PaperParams:
    """The ten parameters, in the order of Algorithm 1; times in seconds."""

    bias: float
    k1: float
    k2: float
    k3: float
    draft_bias: float
    draft_k: float
    reject_bias: float
    reject_k: float
    ridge_share: float  # λ
    base: float  # s


NAMES = tuple(field.name for field in fields(PaperParams))


@dataclass(frozen=True, slots=True)
class PaperModel:
    """Algorithm 1 with given parameters.

    Args:
        num_experts, top_k: ``E`` and the default ``K``.
        ridge_point: RP in tokens (``Machine.ridge_point``).
        as_printed: use line 11 instead of Eq. 4.
    """

    params: PaperParams
    num_experts: int
    top_k: int
    ridge_point: float
    convention: theory.Convention = "engine"
    as_printed: bool = False

    def forward_time(self, tokens: theory.Values, top_k: theory.Values) -> theory.Array:
        """``bias + k1 G(t) + k2 N(t) + k3 G(t K / N(t))``: one target forward over t tokens."""
        p = self.params
        active = theory.active_experts(tokens, self.num_experts, top_k)
        rows = theory.tokens_per_active_expert(tokens, self.num_experts, top_k)
        return p.bias + p.k1 * self._growth(tokens) + p.k2 * active + p.k3 * self._growth(rows)

    def speedups(
        self,
        batch: theory.Values,
        gamma: theory.Values,
        sigma: theory.Values,
        top_k: theory.Values | None = None,
    ) -> theory.Array:
        """Predicted speedup, vectorised over cells."""
        p = self.params
        top_k = self.top_k if top_k is None else top_k
        batch = np.asarray(batch, dtype=float)
        formula = theory.speedup_alg1_as_printed if self.as_printed else theory.speedup_eq4
        return formula(
            sigma,
            gamma,
            ar_time=self.forward_time(batch, top_k),
            draft_time=p.draft_bias + p.draft_k * self._growth(batch),
            verify_time=self.forward_time(
                theory.verify_tokens(batch, gamma, self.convention), top_k
            ),
            reject_time=p.reject_bias + p.reject_k * batch,
        )

    def predict(self, observation: Observation) -> float:
        """Predicted speedup of a cell at its measured sigma."""
        o = observation
        return float(self.speedups(o.batch, o.gamma, o.sigma, o.top_k))

    def _growth(self, tokens: theory.Values) -> theory.Array:
        ridge = self.params.ridge_share * self.ridge_point
        return theory.roofline_growth(tokens, ridge, self.params.base)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PaperModel:
        """The inverse of ``to_json``.

        Raises:
            ValueError: missing or unknown fields.
        """
        try:
            return cls(**{**data, "params": PaperParams(**data["params"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a paper model: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lower and upper bounds of the ten parameters."""

    low: PaperParams
    high: PaperParams

    def __post_init__(self) -> None:
        for name, low, high in zip(NAMES, astuple(self.low), astuple(self.high), strict=True):
            if not low < high:
                raise ValueError(f"bounds of {name} must increase, got [{low}, {high}]")


def paper_bounds(
    target: ModelSpec, draft: ModelSpec | None, machine: Machine, max_reject: float
) -> Bounds:
    """Appendix C.2: from model bytes and bandwidth.

    Args:
        draft: None (no model: an n-gram or replay drafter) bounds its bias by the launch cost.
        max_reject: the longest acceptance step measured, seconds (the paper: reported by vLLM).

    ``k2`` loads one expert in every layer, since the paper's formula has no number of layers.
    """
    if not max_reject > 0:
        raise ValueError(f"max_reject must be positive, got {max_reject}")
    dense = target.dense_weight_bytes / machine.bandwidth
    expert = max(target.one_expert_bytes / machine.bandwidth, 1e-12)
    loaded = machine.launch if draft is None else draft.dense_weight_bytes / machine.bandwidth
    low = PaperParams(dense, 0.0, expert, 0.0, loaded, 0.0, 0.0, 0.0, 0.2, 1.0)
    high = PaperParams(
        _SPAN * dense, _UNBOUNDED, _SPAN * expert, _UNBOUNDED, _SPAN * loaded, _UNBOUNDED,
        max_reject, max_reject, 1.0, 2.0,
    )  # fmt: skip
    return Bounds(low, high)


@dataclass(frozen=True, slots=True)
class PaperFit:
    """A fitted model, its residuals on the fitted points, and what they determine."""

    model: PaperModel
    residuals: np.ndarray = field(repr=False)
    cost: float  # the paper's objective: half the sum of squares
    identifiability: Identifiability

    @property
    def rmse(self) -> float:
        """Root mean square residual of the speedup over the fitted points."""
        return float(np.sqrt(np.mean(np.square(self.residuals))))

    def predict(self, observation: Observation) -> float:
        """Predicted speedup of a cell at its measured sigma."""
        return self.model.predict(observation)


def fit_paper(
    observations: Sequence[Observation],
    bounds: Bounds,
    *,
    num_experts: int,
    top_k: int,
    ridge_point: float,
    convention: theory.Convention = "engine",
    as_printed: bool = False,
    starts: int = 12,
    seed: int = 0,
) -> PaperFit:
    """Fit the ten parameters to speedups by trust region reflective least squares.

    The paper gives no starting point; ``starts`` seeded ones are tried and the best kept.
    Parameters are scaled by ``_Scale`` inside, since seconds and the base s differ by 1e9.

    Raises:
        ValueError: fewer than 10 observations with a speedup.
    """
    from scipy.optimize import least_squares

    require_points(observations)
    cells = [o for o in observations if o.speedup is not None]
    batch, gamma, sigma, truth, experts = np.array(
        [[o.batch, o.gamma, o.sigma, cast(float, o.speedup), o.top_k or top_k] for o in cells]
    ).T
    scale = _Scale(bounds)

    def model_at(z: np.ndarray) -> PaperModel:
        return PaperModel(scale.params(z), num_experts, top_k, ridge_point, convention, as_printed)

    def residuals(z: np.ndarray) -> np.ndarray:
        return np.asarray(model_at(z).speedups(batch, gamma, sigma, experts) - truth)

    random = np.random.default_rng(seed)
    tries = [
        least_squares(
            residuals, scale.start(random, float(batch.max()), ridge_point),
            bounds=(scale.low, scale.high), method="trf", x_scale="jac", max_nfev=400,
        )
        for _ in range(starts)
    ]  # fmt: skip
    best = min(tries, key=lambda result: result.cost)
    return PaperFit(
        model=model_at(best.x),
        residuals=best.fun,
        cost=float(best.cost),
        identifiability=identifiability(best.jac, NAMES),
    )


class _Scale:
    """Solver coordinates: times in units of the dense load, s as log s relative to its bound."""

    def __init__(self, bounds: Bounds) -> None:
        self.unit = bounds.low.bias
        low, high = np.array(astuple(bounds.low)), np.array(astuple(bounds.high))
        low[:8], high[:8] = low[:8] / self.unit, high[:8] / self.unit
        low[9], high[9] = np.log(low[9]), np.log(high[9])
        self.low, self.high = low, high

    def params(self, z: np.ndarray) -> PaperParams:
        """Parameters at a solver point."""
        values = z.copy()
        values[:8] *= self.unit
        values[9] = np.exp(values[9])
        return PaperParams(*values.tolist())

    def start(self, random: np.random.Generator, max_batch: float, ridge: float) -> np.ndarray:
        """A random point whose roofline terms are comparable to the loads at the largest batch."""
        z = np.empty(10)
        z[8] = random.uniform(0.25, 0.95)
        z[9] = min(10.0 ** random.uniform(-4.0, -1.0), 0.9 * self.high[9])
        growth = float(theory.roofline_growth(3 * max_batch, z[8] * ridge, np.exp(z[9])))
        for index in range(8):
            low, high = self.low[index], self.high[index]
            if np.isinf(high):  # k1, k3, draft_k
                z[index] = 10.0 ** random.uniform(-2.0, 0.5) / growth
            else:
                z[index] = random.uniform(low + 0.02 * (high - low), low + 0.7 * (high - low))
        return z

"""Fits the adjustments of ``forward_model`` to measured times, or to speedups alone.

All residuals are logarithms of predicted over measured, so that microseconds and milliseconds,
times and speedups weigh alike. A weak pull towards 1 (the machine's own prediction) settles what
the points leave open instead of letting it run to a bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from decoder.perf_model.hardware.machine import Machine

from .activation import CorrelatedActivation
from .fit_report import Identifiability, identifiability
from .forward_model import Adjustments, ForwardModel
from .model_spec import ModelSpec
from .observations import Observation, require_points

_PRIOR_WEIGHT = 0.03  # a factor e away from the machine costs as much as a 3 % error at one point
_FACTOR_LIMIT = 30.0
_TIMES = ("ar_time", "verify_time", "draft_time", "reject_time")


@dataclass(frozen=True, slots=True)
class ForwardFit:
    """A fitted model and how well it is known.

    Args:
        model: the prior model with adjustments, sharpness and activation exponent fitted.
        rmse: root mean square of the log residuals of the fitted points.
    """

    model: ForwardModel
    points: int
    rmse: float
    identifiability: Identifiability

    def predict(self, observation: Observation) -> float:
        """Predicted speedup of a cell at its measured sigma."""
        return predict_speedup(self.model, observation)


def predict_speedup(model: ForwardModel, observation: Observation) -> float:
    """Eq. 4 for a cell: its batch, gamma, K, context, memory speed and measured sigma."""
    o = observation
    adapted = model.with_top_k(o.top_k).at_memory_speed(o.memory_speed)
    return adapted.speedup(o.batch, o.gamma, o.sigma, o.context)


def fit_forward(
    model: ForwardModel,
    observations: Sequence[Observation],
    *,
    prior_weight: float = _PRIOR_WEIGHT,
) -> ForwardFit:
    """Fit by ``scipy.optimize.least_squares`` (trust region reflective).

    Times present in the observations are fitted jointly with the speedups; parameters that nothing
    in them can see (a draft where there is none, experts in a dense model) stay at 1.

    Args:
        model: the machine's own prediction; the starting point and the prior.
        prior_weight: residual per factor e away from the prior.

    Raises:
        ValueError: fewer than 10 observations with a speedup.
    """
    from scipy.optimize import least_squares

    require_points(observations)
    names = _free_parameters(model)
    low, high = _bounds(model, names)
    # specs per K are built once (their grouped layers are cached inside), and so are machines
    targets = {o.top_k: model.with_top_k(o.top_k).target for o in observations}
    machines = {o.memory_speed: model.at_memory_speed(o.memory_speed).machine for o in observations}

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [
                _data_residuals(_with(model, names, x), targets, machines, observations),
                prior_weight * x,
            ]
        )

    best = None
    for start in _starts(len(names), low, high):
        result = least_squares(residuals, start, bounds=(low, high), method="trf", loss="linear")
        if best is None or result.cost < best.cost:
            best = result
    assert best is not None
    data = best.fun[: len(best.fun) - len(names)]
    return ForwardFit(
        model=_with(model, names, best.x),
        points=len(observations),
        rmse=float(np.sqrt(np.mean(np.square(data)))),
        identifiability=identifiability(best.jac[: len(data)], names),
    )


def sensitivities(model: ForwardModel, observations: Sequence[Observation]) -> np.ndarray:
    """``d log speedup / d log parameter`` per cell at the prior: input of ``d_optimal_indices``.

    Needs no measurement, so points can be chosen before anything is run.
    """
    names = _free_parameters(model)
    step = 1e-3

    def logs(x: np.ndarray) -> np.ndarray:
        moved = _with(model, names, x)
        return np.log([predict_speedup(moved, o) for o in observations])

    origin = np.zeros(len(names))
    columns = []
    for index in range(len(names)):
        shifted = origin.copy()
        shifted[index] = -step  # downwards: the activation exponent may not exceed 1
        columns.append((logs(origin) - logs(shifted)) / step)
    return np.stack(columns, axis=1)


def model_to_json(model: ForwardModel) -> dict[str, Any]:
    """The fitted numbers of a model (not its machine and specs)."""
    activation = model.activation
    data: dict[str, Any] = {"adjust": asdict(model.adjust), "sharpness": model.sharpness}
    if isinstance(activation, CorrelatedActivation):
        data["activation"] = asdict(activation)
    return data


def model_from_json(model: ForwardModel, data: dict[str, Any]) -> ForwardModel:
    """``model`` with the numbers of ``model_to_json``.

    Raises:
        ValueError: unknown or malformed fields.
    """
    try:
        adjust = Adjustments(**{key: float(value) for key, value in data["adjust"].items()})
        model = replace(model, adjust=adjust, sharpness=float(data["sharpness"]))
        if "activation" in data:
            model = replace(model, activation=CorrelatedActivation(**data["activation"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a fitted model: {error!r}") from error
    return model


def _free_parameters(model: ForwardModel) -> list[str]:
    names = [field.name for field in fields(Adjustments)]
    if model.target.moe is None:
        names = [name for name in names if not name.startswith("expert")]
    if model.draft is None:
        names = [name for name in names if not name.startswith("draft")]
    names.append("sharpness")
    if model.target.moe is not None and isinstance(model.activation, CorrelatedActivation):
        names.append("exponent")
    return names


def _bounds(model: ForwardModel, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Logarithmic bounds around the prior."""
    limits = {name: (-math.log(_FACTOR_LIMIT), math.log(_FACTOR_LIMIT)) for name in names}
    limits["sharpness"] = (math.log(1.0 / model.sharpness), math.log(12.0 / model.sharpness))
    if isinstance(model.activation, CorrelatedActivation):
        exponent = model.activation.exponent
        limits["exponent"] = (math.log(0.4 / exponent), math.log(1.0 / exponent) + 1e-9)
    pairs = np.array([limits[name] for name in names])
    return pairs[:, 0], pairs[:, 1]


def _starts(count: int, low: np.ndarray, high: np.ndarray) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    inside = [np.clip(random.normal(0.0, 0.7, count), 0.9 * low, 0.9 * high) for _ in range(2)]
    return [np.clip(np.zeros(count), low + 1e-6, high - 1e-9), *inside]


def _with(model: ForwardModel, names: Sequence[str], x: np.ndarray) -> ForwardModel:
    """The prior moved by ``exp(x)`` in every free parameter."""
    factors = dict(zip(names, np.exp(x).tolist(), strict=True))
    sharpness = model.sharpness * factors.pop("sharpness", 1.0)
    exponent = factors.pop("exponent", None)
    base = asdict(model.adjust)
    adjust = Adjustments(**{name: base[name] * factors.get(name, 1.0) for name in base})
    activation = model.activation
    if exponent is not None and isinstance(activation, CorrelatedActivation):
        moved = min(1.0, activation.exponent * exponent)
        activation = replace(activation, exponent=moved)
    return replace(model, adjust=adjust, sharpness=sharpness, activation=activation)


def _data_residuals(
    model: ForwardModel,
    targets: Mapping[int | None, ModelSpec],
    machines: Mapping[float | None, Machine],
    observations: Sequence[Observation],
) -> np.ndarray:
    """Log ratios, predicted over measured, of everything that was measured."""
    values = []
    for o in observations:
        adapted = replace(model, target=targets[o.top_k], machine=machines[o.memory_speed])
        times = adapted.round_times(o.batch, o.gamma, o.context)
        predicted = (times.ar, times.verify, times.draft, times.reject)
        for name, guess in zip(_TIMES, predicted, strict=True):
            measured = getattr(o, name)
            if measured is not None and guess > 0:
                values.append(math.log(guess / measured))
        if o.speedup is not None:
            guess = o.sigma * (o.gamma + 1) * times.ar_step / times.round(o.gamma)
            values.append(math.log(guess / o.speedup))
    return np.array(values)

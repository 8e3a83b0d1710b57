"""The formulas of the MoESD paper (arXiv 2505.19645), one small function each.

Names: ``E`` experts, ``K`` experts per token, ``B`` sequences, ``gamma`` drafted
tokens, ``alpha`` acceptance rate, ``sigma`` emitted tokens / possible tokens. The paper's ``N`` and
``T_exp`` are spelled out as active experts and tokens per active expert. Everything accepts scalars
or numpy arrays and broadcasts. It contains no machine constants: see ``machine`` for those.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Values = float | npt.ArrayLike
Convention = Literal["paper", "engine"]
CONVENTIONS: tuple[Convention, ...] = ("paper", "engine")


def _as_array(name: str, value: Values, low: float, high: float = math.inf) -> Array:
    array = np.asarray(value, dtype=np.float64)
    if not np.all((array >= low) & (array <= high)):
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value!r}")
    return array


def _check_experts(num_experts: float, top_k: Values) -> Array:
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    return _as_array("top_k", top_k, 0.0, float(num_experts))


def verify_tokens(batch: Values, gamma: Values, convention: Convention) -> Array:
    """Tokens the target processes to verify one round.

    Args:
        convention: ``"paper"`` charges ``B * gamma`` (Algorithm 1); ``"engine"`` charges
            ``B * (gamma + 1)``, because the last emitted token has no KV entry yet and its logits
            judge the first draft. Only the second can be compared with a measurement.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}")
    batch, gamma = _as_array("batch", batch, 0.0), _as_array("gamma", gamma, 0.0)
    return batch * gamma if convention == "paper" else batch * (gamma + 1)


def active_experts(tokens: Values, num_experts: float, top_k: Values) -> Array:
    """``N(t) = E * (1 - ((E - K) / E) ** t)``: distinct experts that t independent tokens touch.

    Source: Eq. 8. Uniform i.i.d. routing; see ``activation`` for tokens that are not.
    """
    top_k = _check_experts(num_experts, top_k)
    tokens = _as_array("tokens", tokens, 0.0)
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** tokens)


def effective_tokens(active: Values, num_experts: float, top_k: float) -> Array:
    """The inverse of Eq. 8: how many independent tokens would touch ``active`` experts.

    Raises:
        ValueError: ``active`` is not below ``num_experts`` (the inverse is infinite there).
    """
    _check_experts(num_experts, top_k)
    active = _as_array("active", active, 0.0)
    if np.any(active >= num_experts):
        raise ValueError(f"active must be below num_experts={num_experts}, got {active}")
    return np.log1p(-active / num_experts) / math.log1p(-top_k / num_experts)


def full_activation_threshold(num_experts: float, top_k: float, tau: float = 0.95) -> int:
    """``ceil(log_(1 - rho)(1 - tau))`` tokens activate a share ``tau`` of the experts; Eq. 9."""
    _check_experts(num_experts, top_k)
    if not 0.0 < tau < 1.0:
        raise ValueError(f"tau must lie in (0, 1), got {tau}")
    if top_k == num_experts:
        return 1
    return math.ceil(math.log1p(-tau) / math.log1p(-top_k / num_experts))


def tokens_per_active_expert(tokens: Values, num_experts: float, top_k: Values) -> Array:
    """``t * K / N(t)``: mean rows of an expert that has any; Eq. 10. It tends to 1 as t -> 0."""
    active = active_experts(tokens, num_experts, top_k)
    routed = np.asarray(tokens, dtype=np.float64) * np.asarray(top_k, dtype=np.float64)
    return np.divide(routed, active, out=np.ones_like(routed * active), where=active > 0)


def expected_tokens(alpha: Values, gamma: Values) -> Array:
    """``(1 - alpha ** (gamma + 1)) / (1 - alpha)`` tokens emitted per round, bonus included.

    Source: numerator of Eq. 5, independent acceptance of rate alpha at every position.
    """
    alpha = _as_array("alpha", alpha, 0.0, 1.0)
    gamma = _as_array("gamma", gamma, 0.0)
    alpha, gamma = np.broadcast_arrays(alpha, gamma)
    near_one = 1.0 - alpha < 1e-9  # the quotient cancels there; its limit is gamma + 1
    safe = np.where(near_one, 0.5, alpha)
    return np.where(near_one, gamma + 1.0, (1.0 - safe ** (gamma + 1.0)) / (1.0 - safe))


def sigma_from_alpha(alpha: Values, gamma: Values) -> Array:
    """Emitted tokens over the maximum ``gamma + 1``; Eq. 5. Not the acceptance rate."""
    return expected_tokens(alpha, gamma) / (np.asarray(gamma, dtype=np.float64) + 1.0)


def alpha_from_sigma(sigma: Values, gamma: Values) -> Array:
    """The acceptance rate at which Eq. 5 gives ``sigma`` (bisection; Eq. 5 is monotone in alpha).

    Raises:
        ValueError: sigma is outside ``[1 / (gamma + 1), 1]``, which no acceptance rate gives.
    """
    sigma, gamma = np.broadcast_arrays(
        _as_array("sigma", sigma, 0.0, 1.0), _as_array("gamma", gamma, 1.0)
    )
    if np.any(sigma < 1.0 / (gamma + 1.0) - 1e-12):
        raise ValueError(f"sigma must be at least 1 / (gamma + 1), got {sigma} at gamma {gamma}")
    low, high = np.zeros(sigma.shape), np.ones(sigma.shape)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = sigma_from_alpha(middle, gamma) < sigma
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray(0.5 * (low + high))


def target_efficiency(ar_time: Values, verify_time: Values) -> Array:
    """``T_T(B, 1) / T_T(B, gamma)``: 1 when verification is free, 1/gamma when compute-bound."""
    return np.asarray(ar_time, dtype=np.float64) / np.asarray(verify_time, dtype=np.float64)


def speedup_eq4(
    sigma: Values,
    gamma: Values,
    *,
    ar_time: Values,
    draft_time: Values,
    verify_time: Values,
    reject_time: Values = 0.0,
) -> Array:
    """``sigma * (gamma + 1) * T_AR / (gamma * T_D + T_verify + T_reject)``.

    Args:
        draft_time: one draft forward, ``T_D(B, 1)``, in the unit of the other times.

    Source: Eq. 4.
    """
    sigma, gamma = np.asarray(sigma, dtype=np.float64), np.asarray(gamma, dtype=np.float64)
    round_time = gamma * np.asarray(draft_time) + np.asarray(verify_time) + np.asarray(reject_time)
    return sigma * (gamma + 1.0) * np.asarray(ar_time) / round_time


def speedup_alg1_as_printed(
    sigma: Values,
    gamma: Values,
    *,
    ar_time: Values,
    draft_time: Values,
    verify_time: Values,
    reject_time: Values = 0.0,
) -> Array:
    """Line 11 of Algorithm 1 as printed: inconsistent with Eq. 4, kept for comparison only.

    It lacks the factor gamma on the draft and adds ``ar_time`` to the denominator, so it cannot
    exceed ``sigma * (gamma + 1) / 2``, which 46 of the paper's 60 measured cells do.
    """
    sigma, gamma = np.asarray(sigma, dtype=np.float64), np.asarray(gamma, dtype=np.float64)
    ar_time = np.asarray(ar_time, dtype=np.float64)
    denominator = np.asarray(draft_time) + ar_time + np.asarray(verify_time)
    return sigma * (gamma + 1.0) * ar_time / (denominator + np.asarray(reject_time))


def break_even_alpha(gamma: Values, needed_tokens: Values) -> Array:
    """The acceptance rate at which a round emits ``needed_tokens``; NaN where even 1 is too low."""
    gamma = _as_array("gamma", gamma, 1.0)
    needed = np.asarray(needed_tokens, dtype=np.float64)
    gamma, needed = np.broadcast_arrays(gamma, needed)
    sigma = np.clip(needed / (gamma + 1.0), 1.0 / (gamma + 1.0), 1.0)
    return np.where(needed > gamma + 1.0, np.nan, alpha_from_sigma(sigma, gamma))


def roofline_growth(tokens: Values, ridge: Values, base: Values) -> Array:
    """``G(t; lambda * RP, s)``: ``s ** t`` up to the transition, its tangent above; Eq. 11.

    Args:
        ridge: the transition ``lambda * RP`` in tokens.
        base: ``s >= 1``; 1 gives the constant 1.
    """
    tokens = _as_array("tokens", tokens, 0.0)
    log_base = np.log(_as_array("base", base, 1.0))
    below = np.minimum(tokens, ridge)
    # exp overflows beyond 709; a fit that wanders there must see a huge finite cost, not inf - inf
    power = np.exp(np.minimum(log_base * below, 600.0))
    return power * (1.0 + log_base * np.maximum(tokens - below, 0.0))

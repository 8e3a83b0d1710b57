"""Recognises what an experts module's gate computes, by asking it.

Model code writes the same few gates in many ways: a default method, a custom ``_apply_gate``, an
activation object from a table. Names and attributes only propose a candidate; it is taken when it
gives the module's own numbers on a probe that reaches into every clamp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moesd_kernels.experts.reference import apply_activation
from moesd_kernels.experts.spec import ExpertsSpec
from moesd_kernels.experts.spec.activations import FUNCTIONS

LIMIT_NAMES = ("limit", "swiglu_limit")
ALPHA_NAMES = ("alpha", "swiglu_alpha")
# Factors on a probe: models' activations reach thousands, and a clamp shows beyond its limit only.
MAGNITUDES = (1.0, 10.0, 1e3, 1e5)


def recognise_gate(
    experts: torch.nn.Module, gated: bool, interleaved: bool = False
) -> ExpertsSpec | None:
    """What a transformers module computes of its projection, or None when it is none of ours.

    Args:
        experts: has ``_apply_gate(gate_up)`` when gated, otherwise ``act_fn``.
        gated: whether there is an up projection.
        interleaved: whether gate and up columns alternate.

    Returns:
        A spec with all but the layout of the weights.
    """
    probe = _probe(experts)
    function: Callable[[Tensor], Tensor] | None = (
        getattr(experts, "_apply_gate", None) if gated else getattr(experts, "act_fn", None)
    )
    if function is None:
        return None
    try:
        with torch.no_grad():
            expected = [function(factor * probe) for factor in MAGNITUDES]
    except (RuntimeError, TypeError, AttributeError, ValueError):
        return None  # it needs more than the projection: none of ours
    for spec in _candidates(experts, gated, interleaved):
        actual = [apply_activation(factor * probe, spec) for factor in MAGNITUDES]
        if all(map(_agree, actual, expected, MAGNITUDES)):
            return spec
    return None


def _agree(actual: Tensor, expected: Tensor, factor: float) -> bool:
    """Whether two results are one; what a cancellation leaves grows as their product does."""
    return actual.shape == expected.shape and torch.allclose(
        actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-6 * factor**2
    )


def _probe(experts: torch.nn.Module) -> Tensor:
    """``[64, 64]`` fp32 values from -30 to 30, dense around 0, on the module's device."""
    device = next((p.device for p in experts.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(64, 64, generator=generator, dtype=torch.float32) * 2 - 1
    return (30 * wide**3).to("cpu" if device.type == "meta" else device)


def _candidates(experts: torch.nn.Module, gated: bool, interleaved: bool) -> list[ExpertsSpec]:
    if not gated:
        return [ExpertsSpec(name, gated=False) for name in FUNCTIONS]
    limits = [None, *_numbers(experts, LIMIT_NAMES)]
    plain = ExpertsSpec(interleaved=interleaved)
    clamped = [replace(plain, activation_limit=limit) for limit in limits]
    specs = [replace(spec, activation=name) for spec in clamped for name in FUNCTIONS]
    alphas = [alpha for alpha in _numbers(experts, ALPHA_NAMES) if alpha]
    return specs + [replace(spec, activation_alpha=alpha) for spec in clamped for alpha in alphas]


def _numbers(experts: torch.nn.Module, names: tuple[str, ...]) -> list[float]:
    values: list[Any] = [getattr(experts, name, None) for name in names]
    return [float(value) for value in values if isinstance(value, (int, float))]

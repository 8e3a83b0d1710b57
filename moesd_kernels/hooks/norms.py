"""Recognises which RMS norm a module computes, by asking it in every dtype it may be turned to.

transformers' classes differ in what they round: ``w * norm.to(dtype)`` (Llama) rounds twice,
``(w * norm).to(dtype)`` (gpt-oss, OLMo 2) once. In fp32 they are one function; in bf16 a quarter of
their values differ.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .shadow import DTYPES

_VALUES = 4096  # that a rule is tried on, at least
_APART = 0.01  # share of values that sums in another order may round to the neighbouring number


@dataclass(frozen=True, slots=True)
class NormRule:
    """What ``dense.ops.rms_norm`` takes beside the tensors.

    Attributes:
        eps: added to the mean of the squares.
        offset: added to the weight.
        cast_first: round the norm to the input's dtype before it is multiplied by the weight.
    """

    eps: float
    offset: float = 0.0
    cast_first: bool = True


def recognise_norm(module: nn.Module) -> NormRule | None:
    """The rule of an RMS norm with a weight ``[H]``, or None when it is none of ours."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    probes = [_Probe(module, eps, dtype) for dtype in DTYPES]
    if any(probe.expected is None for probe in probes):
        return None
    for rule in (NormRule(eps), NormRule(eps, cast_first=False), NormRule(eps, 1.0, False)):
        if all(probe.agrees(rule) for probe in probes):
            return rule
    return None


class _Probe:
    """What a module's class computes of random rows with a random weight, in one dtype."""

    def __init__(self, module: nn.Module, eps: float, dtype: torch.dtype) -> None:
        probe: Any = copy.deepcopy(module).to(dtype)
        generator = torch.Generator().manual_seed(0)
        H = probe.weight.shape[0]
        rows = torch.randn(2 + _VALUES // H, H, generator=generator)
        rows[::2] *= eps**0.5  # so that eps in the wrong place shows
        self._x = rows.to(dtype)
        with torch.no_grad():
            probe.weight.copy_(torch.randn(H, generator=generator))
            self._weight = probe.weight.detach()
            try:
                self.expected = type(module).forward(probe, self._x)
            except (RuntimeError, TypeError):
                self.expected = None

    def agrees(self, rule: NormRule) -> bool:
        from moesd_kernels.dense.ops import rms_norm

        actual = rms_norm(
            *(self._x, self._weight, rule.eps), offset=rule.offset, cast_first=rule.cast_first
        )
        return agree(actual, self.expected)


def agree(actual: Tensor, expected: Tensor) -> bool:
    """Whether results can be of one function, whose sums may be in another order."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    ulp = torch.finfo(actual.dtype).eps
    if not torch.allclose(actual, expected, rtol=max(1e-5, 2 * ulp), atol=1e-6):
        return False
    return actual.dtype == torch.float32 or bool((actual != expected).float().mean() < _APART)

"""Recognises which gated RMS norm a recurrent layer's module computes, as ``norms`` does."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .norms import agree
from .shadow import DTYPES, fits

_ROWS = 64


@dataclass(frozen=True, slots=True)
class GatedNormRule:
    """What ``dense.recurrent.gated_rms_norm`` takes beside the tensors; its arguments' names."""

    eps: float
    group: int
    gate_first: bool
    cast_first: bool
    activation: str


def recognise_gated_norm(module: nn.Module) -> GatedNormRule | None:
    """The rule of a module called with rows and a gate, or None when it is none of ours."""
    eps, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    group = getattr(module, "group_size", weight.numel() // getattr(module, "n_groups", 1))
    probes = [_probe(module, eps, dtype) for dtype in DTYPES]
    for choice in product((False, True), (True, False), ("silu", "sigmoid")):
        rule = GatedNormRule(eps, group, *choice)
        if all(probe is not None and _agrees(rule, *probe) for probe in probes):
            return rule
    return None


def _probe(module: nn.Module, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
    """Random rows, gates and weights in one dtype, and what the module's class makes of them."""
    probe: Any = copy.deepcopy(module).to(dtype)
    generator = torch.Generator().manual_seed(0)
    # One token of each row: some versions of Falcon-H1's drop an axis of one.
    x, gate = torch.randn(2, _ROWS, 1, probe.weight.shape[0], generator=generator)
    x[::2] *= eps**0.5  # so that eps in the wrong place shows
    x, gate = x.to(dtype), gate.to(dtype)
    with torch.no_grad():
        probe.weight.copy_(torch.randn(probe.weight.shape, generator=generator))
        try:
            return x, gate, probe.weight.detach(), type(module).forward(probe, x, gate)
        except (RuntimeError, TypeError):
            return None


def _agrees(rule: GatedNormRule, x: Tensor, gate: Tensor, w: Tensor, expected: Tensor) -> bool:
    if not 0 < rule.group <= x.shape[-1] or x.shape[-1] % rule.group:
        return False
    return agree(torch.ops.moesd.gated_rms_norm(x, gate, w, *astuple(rule)), expected)


@functools.cache
def gated_norm_forward(rule: GatedNormRule) -> Callable[..., Tensor]:
    """The forward of modules of this rule; without a gate it is their class's own."""
    arguments = astuple(rule)

    def forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        weight = self.weight
        alike = gate is not None and (gate.shape, gate.dtype) == (
            hidden_states.shape,
            hidden_states.dtype,
        )
        if not alike or not fits(hidden_states, weight, gate):
            return type(self).forward(self, hidden_states, gate)
        return torch.ops.moesd.gated_rms_norm.default(hidden_states, gate, weight, *arguments)

    return forward

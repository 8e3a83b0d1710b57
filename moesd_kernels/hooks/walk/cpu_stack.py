"""``LayerStack`` of the C++ library: a model's decoder layers without the interpreter between ops.

The class is documented in ``csrc/cpu/ops/layers.cpp``. It runs the MLPs that ``set_mlp`` is taught;
every other layer's MLP is left to the caller, so any block of a model fits in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesd_kernels.experts.backends import BACKENDS
from moesd_kernels.experts.spec import ExpertsSpec

from ..dense import fused_router_of, runs_linear
from ..experts import settings_of, spec_of
from ..mlps import gated_activation_of
from ..packed import scale_of, stored_weight
from .attention import tell_format


def layer_stack() -> Any:
    """An empty stack; the CPU operators must be available (``dense.ops.unavailable``)."""
    return torch.classes.moesd.LayerStack()


def set_mlp(stack: Any, module: Any) -> bool:
    """Give the layer added last its MLP, if ``module`` is one of those the stack computes.

    These are gated dense MLPs, and blocks of a softmax router and gated experts and nothing else;
    their modules must already run on our kernels (``accelerate``).

    Returns:
        Whether it was; otherwise the caller runs the module.
    """
    activation = gated_activation_of(module)
    if activation is not None:
        linears = module.gate_proj, module.up_proj, module.down_proj
        if not all(map(runs_linear, linears)):
            return False
        stack.set_mlp(*(t for m in linears for t in (m.weight, m.bias)), activation)
        for name, linear in zip(("gate", "up", "down"), linears, strict=True):
            tell_format(stack, name, stored_weight(linear))
        return True
    return set(module._modules) == {"gate", "experts"} and _set_moe(stack, module)


def _set_moe(stack: Any, block: Any) -> bool:
    rule = fused_router_of(block.gate)
    if rule is None or not _plain_experts(block.experts, block.gate.weight.dtype):
        return False
    experts = block.experts
    _, spec, _, stored = spec_of(experts)
    stack.set_moe(
        *(block.gate.weight, rule.top_k, rule.renormalize, rule.cast),
        *(experts.gate_up_proj, experts.down_proj, spec.activation),
    )
    for name, stored_as in zip(("gate_up", "down"), spec.formats, strict=True):
        scale = scale_of(experts, f"{name}_proj", stored)
        stack.set_format(name, scale, stored_as, spec.int8_activations)
    return True


def _plain_experts(experts: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the C++ experts compute this module with none of their options but formats."""
    weights: list[Any] = [getattr(experts, name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(type(w) is nn.Parameter and w.is_contiguous() for w in weights):
        return False
    refusal, spec, has_bias, _ = spec_of(experts)
    named = zip(weights, spec.formats, strict=True)
    fits = all(name != "plain" or weight.dtype == dtype for weight, name in named)
    if not fits or refusal is not None or not BACKENDS["cpu"].formats.issuperset(spec.formats):
        return False
    formats = "weight_format", "down_format", "int8_activations"
    stored = {name: getattr(spec, name) for name in formats}
    plain = not has_bias and spec == ExpertsSpec(spec.activation, **stored)
    return plain and settings_of(experts).backend in ("auto", "cpu")

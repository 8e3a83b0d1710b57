"""Which modules of a model on a GPU ``DeviceStack`` computes, read from the modules as they are.

Nothing is shadowed there: the modules keep transformers' forwards, and what is read here runs in
their place only where the decoder has found that it gives their results.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from moesd_kernels.experts.spec import ExpertsSpec, ExpertsWeights

from ..experts import ModuleSpec, settings_of, spec_of
from ..mlps import gated_mlp_forward
from ..norms import NormRule, recognise_norm
from ..routers import RouterRule, correction_of, recognise_router
from ..shadow import DTYPES, is_unshadowed
from .device_stack import Mlp, Moe
from .joined import joined, may_join

_MAX_EXPERTS = 1024
_SHARED = ("gate", "experts", "shared_expert", "shared_expert_gate")


def takes_linear(module: nn.Module) -> bool:
    """Whether this is a plain linear layer."""
    if type(module) is not nn.Linear or not is_unshadowed(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype in DTYPES and weight.is_contiguous()


def takes_norm(module: nn.Module) -> bool:
    """Whether this is an RMS norm as Llama rounds it."""
    named = type(module).__name__.endswith("RMSNorm") and is_unshadowed(module)
    rule = recognise_norm(copy.deepcopy(module).cpu()) if named else None
    return rule is not None and rule == NormRule(rule.eps)


def block_of(module: Any, batch_invariant: bool = False) -> Mlp | Moe | None:
    """The gated MLP or softmax MoE block that ``module`` is, or None: the caller runs the module.

    A gated MLP's gate and up projections become views of one matrix. Experts are also
    ``batch_invariant`` where ``accelerate`` was asked for it.
    """
    if not all(map(is_unshadowed, module.modules())):
        return None
    names = set(module._modules)
    if names == {"gate", "experts"}:
        return _moe(module, batch_invariant)
    if names == set(_SHARED):
        shared = _mlp(module.shared_expert, batch_invariant)
        gate = module.shared_expert_gate
        plain = takes_linear(gate) and gate.bias is None and gate.out_features == 1
        plain &= shared is not None
        return _moe(module, batch_invariant, shared, gate.weight) if plain else None
    return _mlp(module, batch_invariant)


def _mlp(module: Any, batch_invariant: bool) -> Mlp | None:
    forward = gated_mlp_forward(module)
    if forward is None:
        return None
    gate, up, down = module.gate_proj, module.up_proj, module.down_proj
    if not all(map(takes_linear, (gate, up, down))) or gate.bias is not None or up.bias is not None:
        return None
    parameters = [gate.weight, up.weight]
    if not may_join(parameters):
        return None
    activation: str = forward.activation  # type: ignore[attr-defined]
    return Mlp(joined(parameters), down.weight, down.bias, activation, batch_invariant)


def _moe(
    block: Any,
    batch_invariant: bool,
    shared: Mlp | None = None,
    shared_gate: Tensor | None = None,
) -> Moe | None:
    experts, router = block.experts, block.gate
    weight = getattr(router, "weight", None)
    if type(weight) is not nn.Parameter or weight.shape[0] > _MAX_EXPERTS:
        return None
    rule = recognise_router(router)
    if rule is None or rule != RouterRule("softmax", rule.top_k, rule.renormalize, rule.cast):
        return None
    if getattr(router, "bias", None) is not None or correction_of(router) is not None:
        return None
    gate_up: Any = getattr(experts, "gate_up_proj", None)
    down: Any = getattr(experts, "down_proj", None)
    if not all(type(w) is nn.Parameter and w.dtype == weight.dtype for w in (gate_up, down)):
        return None
    computes, settings = spec_of(experts), settings_of(experts)
    plain = computes == ModuleSpec(None, ExpertsSpec(computes.spec.activation))
    if not plain or settings.backend not in ("auto", "triton"):
        return None
    return Moe(
        *(weight, rule.top_k, rule.renormalize, rule.cast),
        ExpertsWeights(gate_up, down),
        computes.spec,
        batch_invariant or settings.batch_invariant,
        shared,
        shared_gate,
    )


def rows_apart(ours: Tensor, theirs: Tensor) -> float:
    """How far states ``[T, H]`` are from theirs, as a share of these.

    The middle row's: a router that a rounding turns changes one row by much.
    """
    if not (ours.isfinite() == theirs.isfinite()).all():
        return math.inf
    error = (ours.double() - theirs.double()).norm(dim=-1)
    share = error / theirs.double().norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(share.median())

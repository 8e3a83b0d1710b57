"""How a loaded model keeps its weights, which need not be how its file does."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from bench.gguf.contents import PLAIN
from decoder.drafters.independent import IndependentDrafter
from decoder.drafters.replay import ReplayDrafter
from decoder.drafters.self_draft import find_experts
from decoder.perf_model.config_spec import spec_from_config
from decoder.perf_model.model_spec import ModelSpec
from moesd_kernels.hooks.packed import linear_classes, stored_experts, stored_weight


def weight_format(model: nn.Module) -> str:
    """The format of most of a model's experts' weights; of its linear layers without experts."""
    linears, experts = _matrices(model)
    kinds: Counter[str] = Counter()
    for module in experts:
        kinds[stored_experts(module).weight_format] += 1
    for module in () if experts else linears:
        kinds[stored_weight(module).weight_format or PLAIN] += _size(module)
    return kinds.most_common(1)[0][0] if kinds else PLAIN


def running_draft(drafter: Any) -> nn.Module | None:
    """The draft model that a drafter runs, stored as it is for its batch; None without one."""
    run = drafter.cost if isinstance(drafter, ReplayDrafter) else drafter
    return run.model if isinstance(run, IndependentDrafter) else None


def draft_format(drafter: Any) -> str:
    """``weight_format`` of the draft that a drafter runs; plain of any other."""
    draft = running_draft(drafter)
    return PLAIN if draft is None else weight_format(draft)


def spec_as_kept(model: Any) -> ModelSpec:
    """The spec of a model with the bytes that its weights are kept in.

    Linear layers and experts count apart, each a weight with the mean of its own, scales included.
    A model of plain weights is as its config says.
    """
    spec = spec_from_config(model.config)
    linears, experts = _matrices(model)
    packed = any(stored_weight(linear).weight_format != PLAIN for linear in linears)
    if not packed and all(stored_experts(module).plain for module in experts):
        return spec
    dense, expert = spec.dense_bytes, spec.expert_bytes
    if linears:
        dense = sum(map(_bytes, linears)) / sum(map(_size, linears))
    if experts:
        weights = sum(layer.num_experts * layer.expert for layer in spec.layers)
        expert = sum(map(_bytes, experts)) / weights
    return spec.with_weight_bytes(dense, expert)


def _matrices(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Linear layers, and modules of experts that are stacked."""
    kinds = linear_classes()
    linears = [module for module in model.modules() if type(module) in kinds]
    return linears, [module for module in find_experts(model) if hasattr(module, "down_proj")]


def _size(linear: Any) -> int:
    return int(linear.in_features * linear.out_features)


def _bytes(module: nn.Module) -> int:
    """Of weights and their scales."""
    own = module.named_parameters(recurse=False)
    return sum(weight.nbytes for name, weight in own if not name.endswith("bias"))

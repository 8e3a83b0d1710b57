"""A transformers MoE block read as a configuration of ours, and its parts under our names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from moesd_kernels.hooks.gates import recognise_gate
from moesd_kernels.hooks.packed import stored_experts
from moesd_kernels.hooks.routers import correction_of, recognise_router

from .config import MoEConfig


def read_block(block: nn.Module) -> tuple[MoEConfig, Mapping[str, nn.Module]]:
    """A transformers block's configuration, and its parts under our names.

    Raises:
        ValueError: a part is missing or quantised, or its router or gate is not one of ours.
    """
    experts: Any = getattr(block, "experts", None)
    gate: Any = getattr(block, "gate", None) or getattr(block, "router", None)
    if experts is None or gate is None or not hasattr(experts, "gate_up_proj"):
        raise ValueError(
            "block must have experts.gate_up_proj and a gate or router, "
            f"got {type(block).__name__} with {[name for name, _ in block.named_children()]}"
        )
    if not stored_experts(experts).plain:
        raise ValueError(f"block must have plain experts, got {type(experts).__name__}, quantised")
    E, rows, columns = experts.down_proj.shape
    if not 1 <= (top_k := getattr(gate, "top_k", 1)) <= E:
        raise ValueError(f"experts per token must be in [1, {E}], got {top_k}")
    interleaved = not getattr(experts, "is_concatenated", True)
    rule, spec = recognise_router(gate), recognise_gate(experts, True, interleaved)
    if rule is None:
        raise ValueError(f"how {type(gate).__name__} chooses is no RouterRule")
    if spec is None:
        raise ValueError(f"what {type(experts).__name__} computes of gate and up is no ExpertsSpec")
    parts = {"gate": gate, "experts": experts}
    shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    shared_gate = getattr(block, "shared_expert_gate", None)
    width = 0
    if shared is not None:
        weight = getattr(getattr(shared, "up_proj", None), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"a shared expert must have up_proj, got {type(shared).__name__}")
        width = weight.shape[0]
        parts["shared_expert"] = shared
    if shared_gate is not None:
        parts["shared_expert_gate"] = shared_gate
    transposed = getattr(experts, "is_transposed", False)
    config = MoEConfig(
        E,
        columns if transposed else rows,
        rows if transposed else columns,
        rule,
        replace(spec, transposed=transposed),
        shared_intermediate_size=width,
        shared_gate=shared_gate is not None,
        router_bias=getattr(gate, "bias", None) is not None,
        correction_bias=correction_of(gate) is not None,
        expert_bias=getattr(experts, "has_bias", False),
    )
    return config, parts


def flatten(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a block's parts, as in a state dict."""
    for part, module in parts.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name == "moe_statics.e_score_correction_bias":  # Ernie 4.5: a row of them
                name, tensor = "e_score_correction_bias", tensor.flatten()
            yield f"{part}.{name}", tensor

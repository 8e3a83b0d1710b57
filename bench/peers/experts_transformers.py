"""transformers' own expert implementations on our weights, called through its experts interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.layer import Layer


def experts_module(layer: Layer, implementation: str) -> nn.Module:
    """A ``Qwen3MoeExperts`` around ``layer``'s weights (no copy) that runs ``implementation``."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = layer.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.H,
        moe_intermediate_size=shape.I,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(layer.w_gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(layer.w_down, requires_grad=False)
    return module.eval()


def transformers_experts(
    layer: Layer, implementation: str
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``call(hidden, topk_ids, topk_weights)`` for ``eager``, ``batched_mm`` or ``grouped_mm``."""
    module = experts_module(layer, implementation)
    return lambda hidden, ids, weights: module(hidden, ids, weights)

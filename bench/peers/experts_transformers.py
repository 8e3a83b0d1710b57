"""transformers' own expert implementations on our weights, called through its experts interface."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.workloads.layer import Layer

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


class TransformersExperts:
    """``call(layer, hidden, topk_ids, topk_weights)`` in one of transformers' implementations."""

    def __init__(self, implementation: str) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"peers are {', '.join(IMPLEMENTATIONS)} or none; got {implementation!r}"
            )
        self.implementation = implementation
        self.modules: dict[int, nn.Module] = {}

    def __call__(self, layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        key = layer.w_gate_up.data_ptr()
        if key not in self.modules:
            self.modules[key] = experts_module(layer, self.implementation)
        return self.modules[key](hidden, ids, weights)


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

"""The modules of a block: its router, its experts, and the expert that every token visits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesd_kernels.experts.spec.activations import FUNCTIONS
from moesd_kernels.formats import WEIGHT_FORMATS, KeepsScales, WeightFormat

from .config import MoEConfig


class Router(nn.Module):
    """The router's parameters."""

    bias: nn.Parameter | None

    def __init__(self, config: MoEConfig, **factory: Any) -> None:
        super().__init__()
        E, H = config.num_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(E, H, **factory))
        bias = nn.Parameter(torch.zeros(E, **factory)) if config.router_bias else None
        self.register_parameter("bias", bias)
        if config.correction_bias:
            zeros = torch.zeros(E, dtype=torch.float32, device=factory.get("device"))
            self.register_buffer("e_score_correction_bias", zeros)


class Experts(KeepsScales):
    """The routed experts' parameters; what is in a quantised format keeps its dtype."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(self, config: MoEConfig, **factory: Any) -> None:
        super().__init__()
        E, H, I = config.num_experts, config.hidden_size, config.intermediate_size
        names, shapes = ("gate_up_proj", "down_proj"), ((2 * I, H), (H, I))
        for name, (rows, depth), kind in zip(names, shapes, config.spec.formats, strict=True):
            if kind == "plain":
                shape = (depth, rows) if config.spec.transposed else (rows, depth)
                self.register_parameter(name, nn.Parameter(torch.empty(E, *shape, **factory)))
            else:
                self._hold(name, (E, rows, depth), WEIGHT_FORMATS[kind], factory.get("device"))
            bias = nn.Parameter(torch.zeros(E, rows, **factory)) if config.expert_bias else None
            self.register_parameter(f"{name}_bias", bias)

    def _hold(
        self, name: str, shape: tuple[int, int, int], stored: WeightFormat, device: Any
    ) -> None:
        """Register a projection's weight and scale in a quantised format, all zeros."""
        E, rows, depth = shape
        if depth % stored.block:
            raise ValueError(
                f"{name} in format {stored.name} needs a depth that is a multiple of "
                f"{stored.block}, got {depth}"
            )
        tensors = {name: ((rows, stored.width(depth)), stored.dtype)}
        for scale_shape in stored.scale_shapes(rows, depth)[:1]:
            tensors[f"{name}_scale"] = scale_shape, stored.scale_dtype
        for key, (size, dtype) in tensors.items():
            zeros = torch.zeros(E, *size, dtype=dtype, device=device)
            self.register_parameter(key, nn.Parameter(zeros, requires_grad=False))
        self.scale_names += tuple(tensors)


class SharedExpert(nn.Module):
    """An expert that every token visits."""

    def __init__(self, config: MoEConfig, **factory: Any) -> None:
        super().__init__()
        H, I = config.hidden_size, config.shared_intermediate_size
        self.gate_proj = nn.Linear(H, I, bias=False, **factory)
        self.up_proj = nn.Linear(H, I, bias=False, **factory)
        self.down_proj = nn.Linear(I, H, bias=False, **factory)
        self.act = FUNCTIONS[config.spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to [..., H]."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))

"""A whole MoE block as one module: router, experts, and the shared expert where there is one.

For use outside transformers, or in place of a transformers block. Parameter names and layouts are
those of transformers' modules (``gate.weight``, ``experts.gate_up_proj``, …), so a block's state
dict loads as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesd_kernels.experts.api import fused_experts
from moesd_kernels.experts.spec import DEFAULT_SPEC, ExpertsSpec
from moesd_kernels.experts.spec.activations import FUNCTIONS
from moesd_kernels.hooks.gates import recognise_gate
from moesd_kernels.hooks.routers import RouterRule, recognise_router, router_logits


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """The shape of a block.

    Attributes:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I of one routed expert.
        router: how experts are chosen; holds K.
        spec: what the routed experts compute; the shared expert has the same activation.
        shared_intermediate_size: I of the shared expert; 0 for none.
        shared_gate: whether the shared expert's output is scaled by ``sigmoid(gate(x))`` (Qwen2).
        router_bias: whether the router's logits have a bias (gpt-oss).
        correction_bias: whether the choice has a bias of its own (DeepSeek-V3).
        expert_bias: whether the experts have biases (gpt-oss).

    Raises:
        ValueError: K is not in ``[1, E]``, the experts have no gate, or a shared expert's gate
            comes without the expert.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    router: RouterRule
    spec: ExpertsSpec = DEFAULT_SPEC
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    correction_bias: bool = False
    expert_bias: bool = False

    def __post_init__(self) -> None:
        if not self.spec.gated:
            raise ValueError(f"spec must be gated, got {self.spec}")
        if not 1 <= self.router.top_k <= self.num_experts:
            raise ValueError(
                f"router.top_k must be in [1, {self.num_experts}], got {self.router.top_k}"
            )
        if self.shared_gate and not self.shared_intermediate_size:
            raise ValueError("shared_gate=True needs shared_intermediate_size, got 0")


class _Router(nn.Module):
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


class _Experts(nn.Module):
    """The routed experts' parameters."""

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(self, config: MoEConfig, **factory: Any) -> None:
        super().__init__()
        E, H, I = config.num_experts, config.hidden_size, config.intermediate_size
        up, down = ((H, 2 * I), (I, H)) if config.spec.transposed else ((2 * I, H), (H, I))
        self.gate_up_proj = nn.Parameter(torch.empty(E, *up, **factory))
        self.down_proj = nn.Parameter(torch.empty(E, *down, **factory))
        for name, width in (("gate_up_proj_bias", 2 * I), ("down_proj_bias", H)):
            bias = nn.Parameter(torch.zeros(E, width, **factory)) if config.expert_bias else None
            self.register_parameter(name, bias)


class _SharedExpert(nn.Module):
    """An expert that every token visits."""

    def __init__(self, config: MoEConfig, **factory: Any) -> None:
        super().__init__()
        H, I = config.hidden_size, config.shared_intermediate_size
        self.gate_proj = nn.Linear(H, I, bias=False, **factory)
        self.up_proj = nn.Linear(H, I, bias=False, **factory)
        self.down_proj = nn.Linear(I, H, bias=False, **factory)
        self.act = FUNCTIONS[config.spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """``sum_k weight_k * expert_k(x) + shared(x)`` over the experts the router chooses.

    Args:
        config: the block's shape.
        backend: back-end of the experts; see ``moesd_kernels.fused_experts``.
        batch_invariant: make routed experts' rows independent of the rest of the batch.
        device: where parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        backend: str = "auto",
        batch_invariant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config, self.backend, self.batch_invariant = config, backend, batch_invariant
        self.gate = _Router(config, **factory)
        self.experts = _Experts(config, **factory)
        self.shared_expert: nn.Module | None = None
        self.shared_expert_gate: nn.Module | None = None
        if config.shared_intermediate_size:
            self.shared_expert = _SharedExpert(config, **factory)
        if config.shared_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1 / fan-in); biases become zero."""
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                axis = 1 if self.config.spec.transposed and name.startswith("experts") else -1
                nn.init.normal_(parameter, std=parameter.shape[axis] ** -0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [..., H] to [..., H], row by row.

        Raises:
            ValueError: the last dimension is not H.
        """
        config = self.config
        if hidden_states.shape[-1] != config.hidden_size:
            raise ValueError(
                f"hidden_states must be [..., {config.hidden_size}], "
                f"got {tuple(hidden_states.shape)}"
            )
        x = hidden_states.reshape(-1, config.hidden_size)
        logits = router_logits(x, self.gate.weight, self.gate.bias, config.router)
        correction = getattr(self.gate, "e_score_correction_bias", None)
        routed = config.router.select(logits, correction, dtype=x.dtype)
        out = fused_experts(
            x,
            self.experts.gate_up_proj,
            self.experts.down_proj,
            routed.ids,
            routed.weights,
            gate_up_bias=self.experts.gate_up_proj_bias,
            down_bias=self.experts.down_proj_bias,
            spec=config.spec,
            backend=self.backend,
            batch_invariant=self.batch_invariant,
        )
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_expert_gate is not None:
                shared = F.sigmoid(self.shared_expert_gate(x)) * shared
            out = out + shared
        return out.view(hidden_states.shape)

    @classmethod
    def from_transformers(cls, block: nn.Module, **options: Any) -> MoE:
        """A block that shares the parameters of a transformers MoE block.

        Args:
            block: has ``experts``, ``gate`` (or ``router``) and maybe a shared expert: the blocks
                of Mixtral, Qwen2/3-MoE, OLMoE, gpt-oss, DeepSeek-V3, GLM-4 and their relatives.
            options: ``backend``, ``batch_invariant``.

        Raises:
            ValueError: a part is missing, or its router or gate is not one of ours.
        """
        config, parts = _read_block(block)
        moe = cls(config, device="meta", **options)
        moe.load_state_dict(dict(_flatten(parts)), strict=True, assign=True)
        return moe.train(block.training)

    @classmethod
    def from_safetensors(
        cls,
        path: str | Path,
        config: MoEConfig,
        *,
        prefix: str = "",
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> MoE:
        """Load a block from a Hugging Face checkpoint: one file, or a folder with or without index.

        Args:
            path: a ``.safetensors`` file or the checkpoint's folder.
            config: the block's shape.
            prefix: of the block's tensors, as in ``"model.layers.3.mlp."``.
            dtype: convert to this dtype; as stored when None.
            options: ``backend``, ``batch_invariant``.

        Raises:
            FileNotFoundError: no safetensors file at ``path``.
            KeyError: a tensor of the block is missing; the message names it.
            ValueError: a file cannot be read, a tensor's shape or type does not fit ``config``, or
                ``config`` has no place for it.
        """
        from .checkpoint import block_state, read_tensors

        moe = cls(config, device="meta", **options)
        wanted = {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()}
        state = block_state(read_tensors(Path(path), prefix), wanted, prefix)
        if dtype is not None:
            keep = "gate.e_score_correction_bias"
            state = {n: t if n == keep else t.to(dtype) for n, t in state.items()}
        moe.load_state_dict(state, strict=True, assign=True)
        return moe


def _read_block(block: nn.Module) -> tuple[MoEConfig, Mapping[str, nn.Module]]:
    """A transformers block's configuration, and its parts under our names."""
    experts: Any = getattr(block, "experts", None)
    gate: Any = getattr(block, "gate", None) or getattr(block, "router", None)
    if experts is None or gate is None or not hasattr(experts, "gate_up_proj"):
        raise ValueError(
            "block must have experts.gate_up_proj and a gate or router, "
            f"got {type(block).__name__} with {[name for name, _ in block.named_children()]}"
        )
    interleaved = not getattr(experts, "is_concatenated", True)
    rule, spec = recognise_router(gate), recognise_gate(experts, True, interleaved)
    if rule is None or spec is None:
        part = gate if rule is None else experts
        raise ValueError(f"cannot express {type(part).__name__} as a router rule or a fused gate")
    parts = {"gate": gate, "experts": experts}
    shared = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    shared_gate = getattr(block, "shared_expert_gate", None)
    if shared is not None:
        parts["shared_expert"] = shared
    if shared_gate is not None:
        parts["shared_expert_gate"] = shared_gate
    E, rows, columns = experts.down_proj.shape
    transposed = getattr(experts, "is_transposed", False)
    config = MoEConfig(
        E,
        columns if transposed else rows,
        rows if transposed else columns,
        rule,
        replace(spec, transposed=transposed),
        shared_intermediate_size=0 if shared is None else shared.up_proj.weight.shape[0],
        shared_gate=shared_gate is not None,
        router_bias=getattr(gate, "bias", None) is not None,
        correction_bias=hasattr(gate, "e_score_correction_bias"),
        expert_bias=getattr(experts, "has_bias", False),
    )
    return config, parts


def _flatten(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for part, module in parts.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            yield f"{part}.{name}", tensor

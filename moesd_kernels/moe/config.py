"""The shape of a MoE block."""

from __future__ import annotations

from dataclasses import dataclass

from moesd_kernels.experts.spec import DEFAULT_SPEC, ExpertsSpec
from moesd_kernels.hooks.routers import RouterRule


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

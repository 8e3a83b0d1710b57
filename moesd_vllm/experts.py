"""Experts of ``moesd_kernels`` in vLLM's fused-MoE layer, on the weights that vLLM has loaded.

vLLM decides first. Where it takes its own CPU or Triton experts, ours are given in their place, if
they compute the same. Quantised experts are chosen elsewhere in vLLM and stay its own.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method as unquantized
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from moesd_kernels import ExpertsSpec
from moesd_kernels.experts.backends import CallTraits, Run, choose_backend
from moesd_kernels.experts.spec import ExpertsWeights, TopK

from .mapping import experts_spec, local_ids
from .settings import experts_wanted
from .versions import logger

Shape = tuple[int, ...]


def _spec_of(moe_config: Any) -> ExpertsSpec:
    """What the experts of a ``FusedMoEConfig`` compute; ValueError as in ``experts_spec``."""
    return experts_spec(
        moe_config.activation.value,
        moe_config.swiglu_limit,
        moe_config.swiglu_alpha,
        moe_config.swiglu_beta,
    )


class _OurExperts:
    """What ours do otherwise than the experts of vLLM that stand after it among the bases."""

    device: ClassVar[str]  # its type
    backend: ClassVar[str]  # of ``moesd_kernels``

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)  # type: ignore[call-arg]
        self._spec = _spec_of(moe_config)
        # The back-end itself: on a CPU one operation, in vLLM's compiled graphs as out of them.
        self._run = self.run_of(moe_config)

    @classmethod
    def run_of(cls, moe_config: Any) -> Run:
        """The back-end's function; RuntimeError where it cannot run, or not in this dtype."""
        return choose_backend(cls.backend, CallTraits(cls.device, moe_config.in_dtype)).load()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leave them: ``[E, 2I, H]``, gate first, and ``[E, H, I]`` are read where they lie."""

    def workspace_shapes(self, M: int, N: int, K: int, *rest: Any) -> tuple[Shape, Shape, Shape]:
        """No workspace, and ``[M, K]`` (vLLM's letters: tokens, hidden) for the result."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        """Nothing is left to do: a token's experts are weighted and summed."""
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the layer's result into ``output`` ``[T, H]``; the arguments are vLLM's."""
        if apply_router_weight_on_input:  # vLLM has multiplied the hidden states by them
            topk_weights = torch.ones_like(topk_weights)
        weights = ExpertsWeights(w1, w2, self.w1_bias, self.w2_bias)  # type: ignore[attr-defined]
        routing = TopK(local_ids(topk_ids, expert_map), topk_weights)
        self._run(hidden_states, weights, routing, self._spec, output)


class MoesdCpuExperts(_OurExperts, CPUUnquantizedExperts):
    """The C++ kernels in place of vLLM's, which repack the weights."""

    device = backend = "cpu"


class MoesdTritonExperts(_OurExperts, TritonExperts):
    """Our Triton kernels in place of vLLM's. Not run on a GPU yet."""

    device, backend = "cuda", "triton"

    @staticmethod
    def supports_lora() -> bool:
        """Not as vLLM's do."""
        return False


REPLACEMENTS: dict[type, type[_OurExperts]] = {
    CPUUnquantizedExperts: MoesdCpuExperts,
    TritonExperts: MoesdTritonExperts,
}


def replacement(chosen: type | None, moe_config: Any) -> tuple[type | None, str]:
    """Ours in place of the class that vLLM has chosen, or None, and the back-end or why not."""
    if chosen is None or not issubclass(chosen, tuple(REPLACEMENTS)):
        return None, "nothing of ours stands in for these"
    ours = next(ours for theirs, ours in REPLACEMENTS.items() if issubclass(chosen, theirs))
    if moe_config.is_lora_enabled:
        return None, "LoRA is on"
    try:
        _spec_of(moe_config)
        ours.run_of(moe_config)
    except (ValueError, RuntimeError) as error:
        return None, str(error)
    return ours, ours.backend


@functools.cache  # a line per kind of layer, not per layer
def _log(kind: str, chosen: str, ours: bool, reason: str) -> None:
    if ours:
        logger.info(
            "moesd: %s run on moesd_kernels (%s) instead of %s; all else stays vLLM's own",
            kind,
            reason,
            chosen,
        )
    else:
        logger.info("moesd: %s stay on vLLM's %s: %s", kind, chosen, reason)


def install() -> None:
    """Have every layer of unquantised experts ask us after vLLM has chosen; once per process."""
    select = unquantized.select_unquantized_moe_backend
    if getattr(select, "moesd", False):
        return

    @functools.wraps(select)
    def select_ours(moe_config: Any) -> tuple[Any, type | None]:
        backend, chosen = select(moe_config)
        config = get_current_vllm_config_or_none()
        if not experts_wanted(getattr(config, "additional_config", None)):
            return backend, chosen
        ours, reason = replacement(chosen, moe_config)
        dtype = str(moe_config.in_dtype).removeprefix("torch.")
        kind = f"unquantised {moe_config.activation.value} experts in {dtype}"
        _log(kind, getattr(chosen, "__name__", str(backend)), ours is not None, reason)
        return backend, ours or chosen

    select_ours.moesd = True  # type: ignore[attr-defined]
    unquantized.select_unquantized_moe_backend = select_ours

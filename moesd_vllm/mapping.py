"""vLLM's description of an expert layer in our words. Nothing of vLLM is imported."""

from __future__ import annotations

import torch
from torch import Tensor

from moesd_kernels import ExpertsSpec

GATED = ("silu", "gelu", "gelu_tanh")
# vLLM's names of experts without a gate end so.
UNGATED_SUFFIX = "_no_mul"
UNGATED = (*GATED, "relu2")
# gpt-oss's gate, whose constants vLLM writes into its kernels.
OAI_LIMIT, OAI_ALPHA = 7.0, 1.702


def experts_spec(
    activation: str,
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
) -> ExpertsSpec:
    """What experts of vLLM's ``MoEActivation`` compute.

    Args:
        activation: the value of a ``MoEActivation``.
        limit: vLLM's ``swiglu_limit``; alpha: its ``swiglu_alpha``; beta: its ``swiglu_beta``.

    Raises:
        ValueError: it is none of ours; the message says why, as the end of a sentence.
    """
    if activation == "silu":
        return ExpertsSpec("silu", activation_limit=limit)
    if activation in GATED:
        return ExpertsSpec(activation)
    bare = activation.removesuffix(UNGATED_SUFFIX)
    if bare != activation and bare in UNGATED:
        return ExpertsSpec(bare, gated=False)
    if activation == "swigluoai":
        return ExpertsSpec(interleaved=True, activation_limit=OAI_LIMIT, activation_alpha=OAI_ALPHA)
    if activation == "swigluoai_uninterleave":
        if limit is None or beta != 1.0:
            raise ValueError(f"its gate has limit {limit} and adds {beta} where ours adds 1")
        return ExpertsSpec(activation_limit=limit, activation_alpha=1.0 if alpha is None else alpha)
    raise ValueError(f"the activation {activation} is none of ours")


def local_ids(topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """Ids of the experts on this rank: -1, which contributes nothing, for those elsewhere.

    Args:
        topk_ids: ``[T, K]`` integer ids among all ranks' experts; negative ones are padding.
        expert_map: ``[experts of all ranks]`` integer ids on this rank, -1 elsewhere; None where
            every expert is here.
    """
    if expert_map is None:
        return topk_ids
    here = expert_map.to(topk_ids.dtype)[topk_ids.clamp(min=0).long()]
    return torch.where(topk_ids < 0, topk_ids, here)

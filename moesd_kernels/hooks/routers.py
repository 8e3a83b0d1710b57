"""Which experts a token goes to, and with what weights: the router families of transformers models.

A ``RouterRule`` is the part after the logits. ``recognise_router`` finds the rule of a model's
router module: its attributes propose candidates, and one is taken when it reproduces the module's
own choice on random inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routed(NamedTuple):
    """A router's result, in the order of transformers' router modules.

    Attributes:
        logits: ``[T, E]``.
        weights: ``[T, K]``.
        ids: ``[T, K]`` int64.
    """

    logits: Tensor
    weights: Tensor
    ids: Tensor


@dataclass(frozen=True, slots=True)
class RouterRule:
    """How logits become experts and weights.

    Attributes:
        kind: "softmax" (softmax, then its K largest; Qwen, OLMoE, Mixtral), "topk_softmax" (softmax
            over the K largest logits; gpt-oss) or "sigmoid" (DeepSeek-V3, GLM-4).
        top_k: K.
        renormalize: divide the K weights by their sum.
        cast: round the weights to the dtype of the hidden states.
        precision: of the logits: the inputs' "own", "fp32", or computed in their own and then
            "upcast" to fp32.
        num_groups: experts are chosen within the best ``topk_groups`` of this many; a group is as
            good as its best expert ("softmax", DeepSeek-V2) or its best two ("sigmoid").
        topk_groups: groups that stay.
        scale: factor on the weights.
    """

    kind: str
    top_k: int
    renormalize: bool = False
    cast: bool = False
    precision: str = "own"
    num_groups: int = 1
    topk_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "topk_softmax", "sigmoid"):
            raise ValueError(
                f"kind must be 'softmax', 'topk_softmax' or 'sigmoid', got {self.kind!r}"
            )
        if self.precision not in ("own", "fp32", "upcast"):
            raise ValueError(f"precision must be 'own', 'fp32' or 'upcast', got {self.precision!r}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")

    def select(
        self, logits: Tensor, correction: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Routed:
        """Choose K experts per token.

        Args:
            logits: ``[T, E]``.
            correction: ``[E]`` added to the scores for the choice only ("sigmoid", or the softmax
                of Ernie 4.5).
            dtype: what ``cast`` rounds the weights to; that of the logits when None.
        """
        dtype = logits.dtype if dtype is None else dtype
        if self.kind == "topk_softmax":
            values, ids = logits.topk(self.top_k, dim=-1)
            weights = values.softmax(dim=-1, dtype=torch.float32)
            return Routed(logits, weights.to(dtype) if self.cast else weights, ids)
        # In fp32 whatever the logits' precision.
        softmax = self.kind == "softmax"
        scores = (
            logits.softmax(dim=-1, dtype=torch.float32) if softmax else logits.float().sigmoid()
        )
        choice = scores if correction is None else scores + correction
        ids = self._within_groups(choice).topk(self.top_k, dim=-1, sorted=softmax).indices
        weights = scores.gather(1, ids)
        if self.renormalize:
            # DeepSeek-V3's guard; it changes no sum that is not a denormal.
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if self.scale != 1.0:
            weights = weights * self.scale
        return Routed(logits, weights.to(dtype) if self.cast else weights, ids)

    def _within_groups(self, choice: Tensor) -> Tensor:
        """``choice`` with experts outside the best groups at -inf."""
        if self.num_groups == 1:
            return choice
        groups = choice.view(choice.shape[0], self.num_groups, -1)  # [T, G, E / G]
        counted = 1 if self.kind == "softmax" else 2
        value = groups.topk(counted, dim=-1).values.sum(dim=-1)  # [T, G]
        kept = value.topk(self.topk_groups, dim=-1, sorted=False).indices
        dropped = torch.ones_like(value, dtype=torch.bool).scatter(1, kept, False)
        return groups.masked_fill(dropped[..., None], float("-inf")).flatten(1)


def router_logits(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: RouterRule,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear,
) -> Tensor:
    """``[T, E]`` logits of ``[T, H]`` rows, in the precision ``rule`` asks for."""
    if rule.precision == "fp32":
        return linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())
    logits = linear(hidden_states, weight, bias)
    return logits.float() if rule.precision == "upcast" else logits


def recognise_router(router: nn.Module) -> RouterRule | None:
    """The rule of a transformers router module, or None when it is none of ours.

    The probe runs on a copy with random weights, because freshly made routers are all zeros, where
    every choice is a tie. It runs in bf16 too, to see which dtypes the module returns.
    """
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not hasattr(router, "top_k"):
        return None
    generator = torch.Generator().manual_seed(0)
    H = weight.shape[1]
    probe = copy.deepcopy(router).to_empty(device="cpu")
    probe.__dict__.pop("forward", None)  # ask the class, not a replacement of ours
    tensors = [*probe.parameters(), *probe.buffers()]
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
                tensor.copy_(drawn / H**0.5)
    hidden = torch.randn(64, H, generator=generator, dtype=torch.float32)
    single = _ask(probe.float(), hidden)
    half = _ask(copy.deepcopy(probe).to(torch.bfloat16), hidden.bfloat16())
    if single is None or half is None:
        return None
    for rule in _candidates(router, half):
        if _agrees(rule, probe, hidden, single):
            return rule
    return None


def correction_of(router: Any) -> Tensor | None:
    """What a router module adds to its scores for the choice, ``[E]``, or None."""
    own = getattr(router, "e_score_correction_bias", None)
    kept = getattr(getattr(router, "moe_statics", None), "e_score_correction_bias", own)  # Ernie
    return None if kept is None else kept.flatten()


def _ask(router: nn.Module, hidden: Tensor) -> Routed | None:
    """What the module's own class answers, or None when that is not (logits, weights, ids)."""
    try:
        with torch.no_grad():
            logits, weights, ids = type(router).forward(router, hidden)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None
    if not all(isinstance(part, Tensor) and part.dim() == 2 for part in (logits, weights, ids)):
        return None
    return Routed(logits, weights, ids) if not ids.is_floating_point() else None


def _candidates(router: Any, half: Routed) -> list[RouterRule]:
    precision = "own"
    if half.logits.dtype == torch.float32:
        rounded = torch.equal(half.logits, half.logits.bfloat16().float())
        precision = "upcast" if rounded else "fp32"
    common: dict[str, Any] = {
        "top_k": int(router.top_k),
        "cast": half.weights.dtype != torch.float32,
        "precision": precision,
        "scale": float(getattr(router, "routed_scaling_factor", None) or 1.0),
    }
    groups: dict[str, Any] = {
        "num_groups": int(getattr(router, "num_group", None) or 1),
        "topk_groups": int(getattr(router, "topk_group", None) or 1),
    }
    rules = [RouterRule("softmax", renormalize=norm, **common) for norm in (True, False)]
    for kind in ("softmax", "sigmoid"):
        rules += [RouterRule(kind, renormalize=norm, **groups, **common) for norm in (True, False)]
    return [*rules, RouterRule("topk_softmax", **{**common, "scale": 1.0})]


def _agrees(rule: RouterRule, router: Any, hidden: Tensor, expected: Routed) -> bool:
    correction = correction_of(router)
    if correction is not None and rule.kind == "topk_softmax":
        return False
    logits = router_logits(hidden, router.weight, getattr(router, "bias", None), rule)
    actual = rule.select(logits, correction)
    if actual.weights.shape != expected.weights.shape or not torch.allclose(
        actual.logits, expected.logits, rtol=1e-4, atol=1e-5
    ):
        return False
    dense = [
        torch.zeros_like(logits).scatter(1, ids, weights)
        for ids, weights in ((actual.ids, actual.weights), (expected.ids, expected.weights))
    ]
    return torch.allclose(dense[0], dense[1], rtol=1e-4, atol=1e-6)

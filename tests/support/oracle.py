"""The two-reference oracle: no hand-picked tolerance.

A result may be at most twice as wrong as eager PyTorch in the same dtype, both against fp64, plus
the rounding of the result itself. The bound is taken per group of rows (the rows one expert
dominates), so that an expert with small weights cannot hide under one with large ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesd_kernels.experts.reference import apply_activation, fused_experts_reference
from moesd_kernels.experts.spec import ExpertsSpec, ExpertsWeights, TopK


def assert_as_accurate(
    actual: Tensor,
    baseline: Tensor,
    exact: Tensor,
    *,
    groups: Tensor | None = None,
    name: str = "result",
) -> None:
    """Fail, naming the worst element, when `actual` is more than twice as wrong as `baseline`.

    Args:
        actual: [T, ...] the result under test.
        baseline: The same computed by eager PyTorch, in the dtype of `actual`.
        exact: The same in fp64.
        groups: [T] integer label of each row; rows of one label share a bound. None for one group.
        name: What the message calls `actual`.
    """
    assert actual.shape == baseline.shape == exact.shape, (
        f"{name}: shapes {tuple(actual.shape)}, {tuple(baseline.shape)}, {tuple(exact.shape)}"
    )
    assert actual.dtype == baseline.dtype, f"{name}: dtype {actual.dtype}, {baseline.dtype}"
    assert exact.dtype == torch.float64, f"{name}: the oracle is {exact.dtype}, not float64"
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().flatten(1)
    allowed = (baseline.double() - exact).abs().flatten(1).amax(1)  # [T]
    rounding = torch.finfo(actual.dtype).eps * exact.abs().flatten(1).amax(1)
    groups = torch.zeros(len(exact), dtype=torch.long) if groups is None else groups.cpu()
    budget = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
    budget.scatter_reduce_(0, groups, 2 * allowed.cpu(), "amax")
    peak = torch.zeros_like(budget).scatter_reduce_(0, groups, 2 * rounding.cpu(), "amax")
    excess = error.cpu() / (budget + peak)[groups][:, None].clamp_min(1e-300)
    excess = torch.where(error.cpu() == 0, 0.0, excess).nan_to_num(nan=float("inf"))
    if excess.max() > 1:
        row, column = divmod(int(excess.argmax()), excess.shape[1])
        raise AssertionError(
            f"{name}: error {error[row, column]:.3e} at row {row}, element {column} is "
            f"{excess.max():.2f} times the bound (got {actual.flatten(1)[row, column]:.6g}, "
            f"exact {exact.flatten(1)[row, column]:.6g})"
        )


class Case(NamedTuple):
    """Arguments of one ``fused_experts`` call."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    options: dict[str, Any]

    def as_run(self) -> tuple[Tensor, ExpertsWeights, TopK, ExpertsSpec]:
        """The call as a back-end is given it."""
        x, w_gate_up, w_down, ids, topk_weights = self.tensors
        options = dict(self.options)
        biases = options.pop("gate_up_bias", None), options.pop("down_bias", None)
        weights = ExpertsWeights(w_gate_up, w_down, *biases)
        return x, weights, TopK(ids, topk_weights), ExpertsSpec(**options)


def make_case(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inter: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random inputs in which every expert has the same magnitude; ids distinct within a row."""
    g = torch.Generator().manual_seed(seed)
    gated, transposed = options.get("gated", True), options.get("transposed", False)
    width = 2 * inter if gated else inter
    x = torch.randn(tokens, hidden, generator=g)
    w_gate_up = torch.randn(experts, width, hidden, generator=g) / hidden**0.5
    w_down = torch.randn(experts, hidden, inter, generator=g) / inter**0.5
    if transposed:
        w_gate_up = w_gate_up.transpose(1, 2).contiguous()
        w_down = w_down.transpose(1, 2).contiguous()
    ids = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, generator=g) + 0.1
    if bias:
        options["gate_up_bias"] = torch.randn(experts, width, generator=g).to(dtype)
        options["down_bias"] = torch.randn(experts, hidden, generator=g).to(dtype)
    tensors = (x.to(dtype), w_gate_up.to(dtype), w_down.to(dtype), ids, weights)
    return Case(tensors, options)


def exact_experts(case: Case) -> Tensor:
    """The reference in fp64."""
    x, weights, routing, spec = case.as_run()
    wide = ExpertsWeights(*(t if t is None else t.double() for t in weights))
    routing = routing._replace(weights=routing.weights.double())
    return fused_experts_reference(x.double(), wide, routing, spec)


def eager_experts(case: Case) -> Tensor:
    """What an eager transformers model computes: every step rounded to the model's dtype."""
    x, weights, routing, spec = case.as_run()
    out = torch.zeros_like(x)
    for expert in range(weights.down.shape[0]):
        token, k = torch.where(routing.ids == expert)
        up, down = weights.gate_up[expert], weights.down[expert]
        up, down = (up, down) if spec.transposed else (up.T, down.T)
        y = x[token] @ up
        if weights.gate_up_bias is not None:
            y = y + weights.gate_up_bias[expert]
        y = apply_activation(y, spec) @ down
        if weights.down_bias is not None:
            y = y + weights.down_bias[expert]
        out.index_add_(0, token, (y * routing.weights[token, k, None]).to(x.dtype))
    return out


def dominant_expert(case: Case) -> Tensor:
    """[T] the valid expert with the largest weight in each row: the groups of the bound."""
    _, _, w_down, ids, weights = case.tensors
    E = w_down.shape[0]
    if ids.numel() == 0:
        return torch.zeros(ids.shape[0], dtype=torch.long)
    valid = (ids >= 0) & (ids < E)
    best = torch.where(valid, weights.float(), -1).argmax(1)
    return ids.gather(1, best[:, None])[:, 0].clamp(0, E).long()


def check_experts(actual: Tensor, case: Case, name: str = "fused_experts") -> None:
    """Hold one ``fused_experts`` result to the bound."""
    assert_as_accurate(
        actual,
        eager_experts(case),
        exact_experts(case),
        groups=dominant_expert(case),
        name=name,
    )

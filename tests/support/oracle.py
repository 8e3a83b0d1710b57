"""The two-reference oracle: no hand-picked tolerance.

A result may be at most twice as wrong as eager PyTorch in the same dtype, both against fp64, plus
the rounding of the result itself. The bound is taken per group of rows (the rows one expert
dominates, or each row alone), so that an expert with small weights cannot hide under one with large
ones. The layer is written out here and shares no arithmetic with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moesd_kernels.experts.spec import ExpertsSpec, ExpertsWeights, TopK

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


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
    """Arguments of one ``fused_experts`` call.

    Attributes:
        tensors: x ``[T, H]``, w_gate_up ``[E, 2I, H]``, w_down ``[E, H, I]``, ids and weights
            ``[T, K]``, as transformers lays them out.
        options: what is passed by name.
    """

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    options: dict[str, Any]

    x = property(lambda self: self.tensors[0])
    w_gate_up = property(lambda self: self.tensors[1])
    w_down = property(lambda self: self.tensors[2])
    ids = property(lambda self: self.tensors[3])
    weights = property(lambda self: self.tensors[4])

    def as_run(self) -> tuple[Tensor, ExpertsWeights, TopK, ExpertsSpec]:
        """The call as a back-end is given it."""
        options = dict(self.options)
        beside = ExpertsWeights._fields[2:]
        weights = ExpertsWeights(
            self.w_gate_up, self.w_down, *(options.pop(name, None) for name in beside)
        )
        return self.x, weights, TopK(self.ids, self.weights), ExpertsSpec(**options)

    def run(self, backend: Callable[..., Tensor], **more: Any) -> Tensor:
        """Call a back-end."""
        return backend(*self.as_run(), **more)

    def rows(self, index: Any) -> Case:
        """The same layer on some of the tokens, copied."""
        x, ids, weights = (t[index].contiguous() for t in (self.x, self.ids, self.weights))
        return self.on(x, ids, weights)

    def on(self, x: Tensor, ids: Tensor, weights: Tensor) -> Case:
        """The same layer on other tokens."""
        return self._replace(tensors=(x, self.w_gate_up, self.w_down, ids, weights))


def make_case(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    inter: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    ids: Tensor | None = None,
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
    if ids is None:
        ids = torch.rand(tokens, experts, generator=g).argsort(-1)[:, :top_k].contiguous()
    weights = torch.rand(tokens, top_k, generator=g) + 0.1
    place = lambda tensor: tensor.to(dtype).to(device)
    if bias:
        options["gate_up_bias"] = place(torch.randn(experts, width, generator=g))
        options["down_bias"] = place(torch.randn(experts, hidden, generator=g))
    tensors = (place(x), place(w_gate_up), place(w_down), ids.to(device), weights.to(device))
    return Case(tensors, options)


def layer_case(
    E: int,
    K: int,
    H: int,
    I: int,
    T: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> Case:
    """``make_case`` with the layer's sizes first."""
    return make_case(T, K, E, H, I, dtype, device=device, **options)


def experts_in(case: Case, dtype: torch.dtype) -> Tensor:
    """The layer expert by expert in ``dtype``, every step rounded to it as eager PyTorch rounds."""
    x, w_gate_up, w_down, ids, weights = case.tensors
    o = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    out = torch.zeros_like(x, dtype=dtype)
    for expert in range(w_down.shape[0]):
        token, choice = torch.where(ids == expert)
        up, down = w_gate_up[expert].to(dtype), w_down[expert].to(dtype)
        up, down = (up, down) if o.get("transposed") else (up.T, down.T)
        y = x.to(dtype)[token] @ up
        if "gate_up_bias" in o:
            y = y + o["gate_up_bias"][expert]
        y = _activate(y, o) @ down
        if "down_bias" in o:
            y = y + o["down_bias"][expert]
        out.index_add_(0, token, (y * weights[token, choice, None]).to(dtype))
    return out


def _activate(projected: Tensor, options: dict[str, Any]) -> Tensor:
    act = ACTIVATIONS[options.get("activation", "silu")]
    if not options.get("gated", True):
        return act(projected)
    if options.get("interleaved"):
        gate, up = projected[..., 0::2], projected[..., 1::2]
    else:
        gate, up = projected.chunk(2, dim=-1)
    limit, alpha = options.get("activation_limit"), options.get("activation_alpha")
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if alpha is not None:
        return gate * torch.sigmoid(gate * alpha) * (up + 1)
    return act(gate) * up


def exact_experts(case: Case) -> Tensor:
    """The layer in fp64."""
    return experts_in(case, torch.float64)


def eager_experts(case: Case) -> Tensor:
    """What an eager transformers model computes: every step rounded to the model's dtype."""
    return experts_in(case, case.x.dtype)


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


def check_rows(case: Case, actual: Tensor) -> None:
    """Hold every row of one ``fused_experts`` result to a bound of its own."""
    rows = torch.arange(len(actual))
    assert_as_accurate(actual, eager_experts(case), exact_experts(case), groups=rows)


def attention_inputs(B, Q, heads, kv_heads, D, Dv, S, dtype, seed=0):
    """q ``[B, Q, heads, D]``, a cache of S positions, and positions ``[B, Q]`` that end in it."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, Q, heads, D, generator=g).to(dtype)
    # [rows, Hkv, S, D] in memory, handed over as [rows, S, Hkv, D].
    k = torch.randn(B, kv_heads, S, D, generator=g).to(dtype).transpose(1, 2)
    v = torch.randn(B, kv_heads, S, Dv, generator=g).to(dtype).transpose(1, 2)
    start = torch.randint(0, S - Q + 1, (B, 1), generator=g)
    return q, k, v, start + torch.arange(Q)


def attention_in(q, k, v, positions, scale, dtype, window=0, sinks=None, rows=None):
    """Ragged attention query by query in ``dtype``, as `moesd_kernels.dense.ops` defines it."""
    B, Q, heads, _ = q.shape
    out = torch.zeros(B, Q, heads, v.shape[3], dtype=dtype)
    group = heads // k.shape[2]
    for b in range(B):
        row = b if rows is None else int(rows[b])
        for j in range(Q):
            p = int(positions[b, j])
            if p < 0:
                continue
            lo = max(0, p - window + 1) if window > 0 else 0
            keys = k[row, lo : p + 1].to(dtype).repeat_interleave(group, dim=1)
            values = v[row, lo : p + 1].to(dtype).repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,shd->hs", q[b, j].to(dtype), keys) * scale
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(dtype)[:, None]], dim=1)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            weights = scores.softmax(-1, dtype=wide).to(dtype)[:, : p + 1 - lo]
            out[b, j] = torch.einsum("hs,shd->hd", weights, values)
    return out

"""Layers, an fp64 oracle, eager PyTorch in the layer's dtype, and the element-wise bound."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesd_kernels.experts.spec import ExpertsSpec, ExpertsWeights, TopK

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Case:
    """One call of the layer: tensors in transformers' layout and the flags."""

    x: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    ids: Tensor
    weights: Tensor
    flags: dict[str, Any] = field(default_factory=dict)

    def run(self, backend, **extra) -> Tensor:
        """Call a back-end."""
        flags = dict(self.flags)
        biases = flags.pop("gate_up_bias", None), flags.pop("down_bias", None)
        weights = ExpertsWeights(self.w_gate_up, self.w_down, *biases)
        return backend(self.x, weights, TopK(self.ids, self.weights), ExpertsSpec(**flags), **extra)

    def rows(self, index) -> "Case":
        """The same layer on some of the tokens."""
        x, ids, weights = (t[index].contiguous() for t in (self.x, self.ids, self.weights))
        return replace(self, x=x, ids=ids, weights=weights)


def make_case(
    E, K, H, I, T, dtype=torch.float32, device="cpu", seed=0, ids=None, bias=False, **flags
) -> Case:
    """Random layer; ids are distinct per token unless given."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    columns = 2 * I if flags.get("gated", True) else I
    w_gate_up, w_down = normal(E, columns, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5)
    if bias:
        flags |= {"gate_up_bias": normal(E, columns), "down_bias": normal(E, H)}
    if flags.get("transposed"):
        w_gate_up = w_gate_up.transpose(1, 2).contiguous()
        w_down = w_down.transpose(1, 2).contiguous()
    if ids is None:
        ids = torch.rand(T, E, generator=generator).topk(K, dim=-1).indices
    weights = torch.rand(T, K, generator=generator) + 0.1
    return Case(normal(T, H), w_gate_up, w_down, ids.to(device), weights.to(device), flags)


def layer(case: Case, dtype: torch.dtype) -> Tensor:
    """The layer expert by expert in ``dtype``, every step rounded to it as eager PyTorch rounds."""
    flags = case.flags
    w_gate_up, w_down = case.w_gate_up.to(dtype), case.w_down.to(dtype)
    if flags.get("transposed"):
        w_gate_up, w_down = w_gate_up.transpose(1, 2), w_down.transpose(1, 2)
    out = torch.zeros(case.x.shape, dtype=dtype, device=case.x.device)
    for e in range(len(w_down)):
        token, k = (case.ids == e).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        h = case.x.to(dtype)[token] @ w_gate_up[e].T
        if flags.get("gate_up_bias") is not None:
            h = h + flags["gate_up_bias"].to(dtype)[e]
        y = _activate(h, flags) @ w_down[e].T
        if flags.get("down_bias") is not None:
            y = y + flags["down_bias"].to(dtype)[e]
        weight = case.weights.to(dtype)[token, k, None]
        out.index_add_(0, token, y * weight)
    return out


def _activate(h: Tensor, flags: dict[str, Any]) -> Tensor:
    act = ACTIVATIONS[flags.get("activation", "silu")]
    if not flags.get("gated", True):
        return act(h)
    if flags.get("interleaved"):
        gate, up = h[..., 0::2], h[..., 1::2]
    else:
        gate, up = h.chunk(2, dim=-1)
    limit, alpha = flags.get("activation_limit"), flags.get("activation_alpha")
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if alpha is not None:
        return gate * torch.sigmoid(gate * alpha) * (up + 1)
    return act(gate) * up


def check(case: Case, got: Tensor) -> None:
    """``got`` is at most twice as wrong as eager PyTorch, element by element.

    The eager error of an element may be zero by luck, so a row's worst stands for its elements;
    rounding is that of the summands, which are as large as the row's largest result.
    """
    assert got.shape == case.x.shape and got.dtype == case.x.dtype
    if got.numel() == 0:
        return
    oracle = layer(case, torch.float64)
    eager = (layer(case, case.x.dtype).double() - oracle).abs().amax(-1, keepdim=True)
    rounding = torch.finfo(got.dtype).eps * oracle.abs().amax(-1, keepdim=True)
    bound = (2 * (eager + rounding)).expand_as(oracle)
    error = (got.double() - oracle).abs()
    if not bool((error <= bound).all()):
        worst = torch.where(error.isnan(), torch.inf, error - bound).flatten().argmax()
        t, h = divmod(int(worst), case.x.shape[1])
        raise AssertionError(
            f"worst at [{t}, {h}]: got {got[t, h].item()}, expected {oracle[t, h].item()}, "
            f"error {error[t, h].item():.3e}, bound {bound[t, h].item():.3e}"
        )

"""The rest of the layer on the CPU kernels: linear layers, gated MLPs, RMS norms and routers.

Two reasons. torch's bf16 matrix product is slow on processors without bf16 instructions; and each
of our kernels computes a row from that row alone, so a model made only of them gives a token the
same logits, bit for bit, whether it is verified among γ drafts or decoded alone.

A module keeps its class, parameters and buffers; only its bound ``forward`` is shadowed on the
instance. A replacement is made only when it reproduces the module's own result on a probe, and
steps aside, running the class's forward, for gradients, autocast, other devices and compiled
graphs.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .gates import recognise_gate
from .norms import NormRule, recognise_norm
from .routers import RouterRule, recognise_router, router_logits

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_EXPERTS = 1024  # of the fused softmax router
_VECTOR = 32  # elements torch's loops take per step, at most


def accelerate_dense(model: nn.Module, *, required: bool = False) -> int:
    """Shadow the forwards that our CPU kernels can compute; returns how many.

    Args:
        model: only modules whose parameters are plain CPU tensors are touched.
        required: raise instead of doing nothing when the kernels cannot run.

    Raises:
        RuntimeError: ``required``, and the kernels cannot run here; the message says why.
    """
    if not required and not any(p.device.type == "cpu" for p in model.parameters()):
        return 0
    from moesd_kernels.dense import ops

    reason = ops.unavailable()
    if reason is not None:
        if required:
            raise RuntimeError(f"dense=True needs the CPU kernels: {reason}")
        return 0
    count = 0
    for module in model.modules():
        forward = _replacement(module)
        if forward is not None:
            module.forward = types.MethodType(forward, module)
            count += 1
    logger.info("%d dense modules run the CPU kernels (%s)", count, ops.isa())
    return count


def decelerate_dense(model: nn.Module) -> None:
    """Give every module of ``model`` that ``accelerate_dense`` touched its own forward back."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if getattr(getattr(forward, "__func__", None), "__module__", None) == __name__:
            del module.forward


def _replacement(module: nn.Module) -> Callable[..., Any] | None:
    """The forward for ``module``, or None when it must keep its own."""
    weight = getattr(module, "weight", None)
    if type(module) in _activations() and "forward" not in module.__dict__:
        return _activation_forward
    activation = _gated_mlp(module)
    if activation is not None:
        return _mlp_forward(activation)
    if (
        "forward" in module.__dict__  # somebody else's hook, or already ours
        or type(weight) is not nn.Parameter
        or weight.dtype not in _DTYPES
        or weight.device.type != "cpu"
        or not weight.is_contiguous()
    ):
        return None
    if type(module) is nn.Linear:
        return _column_forward if module.out_features == 1 else _linear_forward
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        norm = recognise_norm(module)
        if norm is not None:
            return _norm_forward(norm)
    if name.lower().endswith(("topkrouter", "moegate")):
        rule = recognise_router(module)
        if rule is not None:
            return _router_forward(rule, _fusable(rule, module))
    return None


def _fusable(rule: RouterRule, router: nn.Module) -> bool:
    """Whether the one-op softmax router computes ``rule``."""
    weight = router.weight
    assert isinstance(weight, Tensor)
    return (
        rule.kind == "softmax"
        and rule.precision == "own"
        and rule.scale == 1.0
        and getattr(router, "bias", None) is None
        and weight.shape[0] <= _MAX_EXPERTS
    )


_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def _gated_mlp(module: nn.Module) -> str | None:
    """The activation's name if ``module`` is ``down(act(gate(x)) * up(x))``, else None."""
    parts = module._modules
    if (
        "forward" in module.__dict__
        or set(parts) != {*_MLP_PARTS, "act_fn"}
        or module._parameters
        or any(type(parts[name]) is not nn.Linear for name in _MLP_PARTS)
        or type(parts["act_fn"]) not in _activations()
    ):
        return None
    gate = recognise_gate(module, gated=False)
    return gate.activation if gate and _mlp_agrees(module, gate.activation) else None


def _mlp_agrees(module: nn.Module, activation: str) -> bool:
    """Whether the class's forward computes that, tried on small layers in place of its own."""
    from moesd_kernels.dense.ops import act_and_mul

    generator = torch.Generator().manual_seed(0)
    small = {name: nn.Linear(5, 5) for name in _MLP_PARTS}
    probe = copy.copy(module)
    probe._modules = {**small, "act_fn": module._modules["act_fn"]}
    x = torch.randn(4, 5, generator=generator)
    with torch.no_grad():
        for linear in small.values():
            linear.weight.copy_(torch.randn(5, 5, generator=generator))
            linear.bias.zero_()
        try:
            expected = type(module).forward(probe, x)
        except (RuntimeError, TypeError, AttributeError):
            return False
        gate, up, down = (small[name] for name in _MLP_PARTS)
        actual = down(act_and_mul(gate(x), up(x), activation))
    return isinstance(expected, Tensor) and torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


@functools.cache
def _mlp_forward(activation: str) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _fits(x, self.down_proj.weight):
            return type(self).forward(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.requires_grad or up.requires_grad:  # an adapter in front of frozen weights
            return type(self).forward(self, x)
        return self.down_proj(torch.ops.moesd.act_and_mul.default(gate, up, activation))

    forward.activation = activation  # type: ignore[attr-defined]
    return forward


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether this call can take the CPU kernels."""
    return (
        x.dtype == weight.dtype
        and x.device.type == "cpu"
        and x.numel() > 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    weight = self.weight
    if not _fits(input, weight):
        return nn.Linear.forward(self, input)
    if input.dim() == 2:
        return torch.ops.moesd.linear.default(input, weight, self.bias)
    rows = input.reshape(-1, input.shape[-1])
    return torch.ops.moesd.linear.default(rows, weight, self.bias).view(*input.shape[:-1], -1)


def _column_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """One output per row: a shared expert's gate, which goes through a sigmoid next."""
    out = _linear_forward(self, input)
    return _rows_apart(out) if _fits(input, self.weight) else out


def _activation_forward(self: nn.Module, input: Tensor) -> Tensor:
    """The module's own activation on rows that are computed one by one."""
    return type(self).forward(self, _rows_apart(input) if _fits(input, input) else input)


def _rows_apart(x: Tensor) -> Tensor:
    """``x``, or a copy whose rows do not follow each other in memory.

    torch's element-wise loops compute whole vectors of contiguous numbers with other instructions
    than what is left over, so where rows are not whole vectors, the last bits of a row depend on
    how many rows there are. A gap between rows makes each a loop of its own.
    """
    width = x.shape[-1]
    if width % _VECTOR == 0:
        return x
    return x.new_empty(*x.shape[:-1], width + 1)[..., :width].copy_(x)


@functools.cache
def _activations() -> frozenset[type[nn.Module]]:
    """Classes of the activations in dense MLPs."""
    classes = {nn.SiLU, nn.GELU}
    try:
        from transformers.activations import GELUTanh, SiLUActivation
    except ImportError:
        return frozenset(classes)
    return frozenset(classes | {GELUTanh, SiLUActivation})


@functools.cache
def _norm_forward(rule: NormRule) -> Callable[..., Tensor]:
    eps, offset, cast_first = rule.eps, rule.offset, rule.cast_first

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if not _fits(hidden_states, weight):
            return type(self).forward(self, hidden_states)
        return torch.ops.moesd.rms_norm.default(hidden_states, weight, eps, offset, cast_first)

    return forward


@functools.cache
def _router_forward(rule: RouterRule, fuse: bool) -> Callable[..., Any]:
    def fused(self: Any, hidden_states: Tensor) -> Any:
        weight = self.weight
        if not _fits(hidden_states, weight):
            return type(self).forward(self, hidden_states)
        rows = hidden_states.reshape(-1, weight.shape[1])
        logits, weights, ids = torch.ops.moesd.softmax_topk_router.default(
            rows, weight, rule.top_k, rule.renormalize
        )
        return logits, weights.to(logits.dtype) if rule.cast else weights, ids

    def composed(self: Any, hidden_states: Tensor) -> Any:
        weight = self.weight
        if not _fits(hidden_states, weight):
            return type(self).forward(self, hidden_states)
        rows, bias = hidden_states.reshape(-1, weight.shape[1]), getattr(self, "bias", None)
        logits = router_logits(rows, weight, bias, rule, linear=torch.ops.moesd.linear.default)
        correction = getattr(self, "e_score_correction_bias", None)
        return tuple(rule.select(_rows_apart(logits), correction, dtype=hidden_states.dtype))

    fused.rule = rule  # type: ignore[attr-defined]
    return fused if fuse else composed


def _shadow(module: nn.Module) -> Any:
    """The function that shadows the module's forward, or None."""
    return getattr(module.__dict__.get("forward"), "__func__", None)


def runs_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer on our kernel."""
    return _shadow(module) is _linear_forward


def gated_activation_of(module: nn.Module) -> str | None:
    """The activation of a gated MLP on our kernels; None for anything else."""
    return getattr(_shadow(module), "activation", None)


def fused_router_of(module: nn.Module) -> RouterRule | None:
    """The rule of a router that is one op of ours; None for anything else."""
    return getattr(_shadow(module), "rule", None)

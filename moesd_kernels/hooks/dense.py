"""The rest of the layer on the CPU kernels: linear layers, gated MLPs, RMS norms and routers.

Two reasons. torch's bf16 matrix product is slow on processors without bf16 instructions; and each
of our kernels computes a row from that row alone, so a model made only of them gives a token the
same logits, bit for bit, whether it is verified among γ drafts or decoded alone.

A module keeps its class, parameters and buffers; only its bound ``forward`` is shadowed on the
instance. A replacement is made only when it reproduces the module's own result on a probe, and
steps aside, running the class's forward, for gradients, autocast, other devices, compiled graphs
and calls with more than the one input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .gated_norms import gated_norm_forward, recognise_gated_norm
from .mlps import activations, gated_mlp_forward
from .norms import NormRule, recognise_norm
from .packed import StoredWeight, linear_classes, stored_weight
from .products import linear, takes, with_our_products
from .routers import RouterRule, correction_of, recognise_router, router_logits
from .shadow import DTYPES, fits, is_unshadowed, rows_apart, shadow, shadow_of

_MAX_EXPERTS = 1024  # of the fused softmax router


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
            shadow(module, forward)
            count += 1
    return count


def _replacement(module: nn.Module) -> Callable[..., Any] | None:
    """The forward for ``module``, or None when it must keep its own."""
    if not is_unshadowed(module):  # by somebody else, or already by us
        return None
    weight = getattr(module, "weight", None)
    if type(module) in activations():
        return _activation_forward
    mlp = gated_mlp_forward(module)
    if mlp is not None:
        return mlp
    if type(module) in linear_classes() - {nn.Linear}:
        return _stored_forward if _readable(stored_weight(module)) else None
    name = type(module).__name__
    if name.lower().endswith(("router", "moegate")):
        return _router_replacement(module)
    if not _is_ours(weight):
        return None
    if type(module) is nn.Linear:
        return _column_forward if module.out_features == 1 else _linear_forward
    if name.endswith("RMSNorm"):
        norm = recognise_norm(module)
        if norm is not None:
            return _norm_forward(norm)
    if name.endswith("RMSNormGated"):
        gated = recognise_gated_norm(module)
        if gated is not None:
            return gated_norm_forward(gated)
    return None


def _is_ours(weight: Any) -> bool:
    """Whether our kernels read a weight where it lies."""
    return (
        type(weight) is nn.Parameter
        and weight.dtype in DTYPES
        and weight.device.type == "cpu"
        and weight.is_contiguous()
    )


def _router_replacement(router: nn.Module) -> Callable[..., Any]:
    rule = recognise_router(router) if _is_ours(getattr(router, "weight", None)) else None
    if rule is None:  # MiniMax-M2, LFM2, LongCat
        return with_our_products
    return _router_forward(rule, _fusable(rule, router), _choices(router))


def _fusable(rule: RouterRule, router: nn.Module) -> bool:
    """Whether the one-op softmax router computes ``rule``."""
    weight = router.weight
    assert isinstance(weight, Tensor)
    return (
        rule == RouterRule("softmax", rule.top_k, rule.renormalize, rule.cast)
        and correction_of(router) is None
        and getattr(router, "bias", None) is None
        and weight.shape[0] <= _MAX_EXPERTS
    )


def _linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    weight, bias = self.weight, self.bias
    if type(self) is not nn.Linear or not takes(input, weight, bias):
        return type(self).forward(self, input)
    return linear(input, weight, bias)


def _stored_forward(self: Any, input: Tensor) -> Tensor:
    """A linear layer whose matrix is in a quantised format."""
    weight, scale, name, int8_activations = stored_weight(self)
    bias = self.bias
    if not fits(input, weight, bias) or (bias is not None and bias.dtype != input.dtype):
        return type(self).forward(self, input)
    rows = input.reshape(-1, input.shape[-1])
    out = torch.ops.moesd.linear.default(rows, weight, bias, scale, name, int8_activations)
    return out.view(*input.shape[:-1], -1)


def _readable(stored: StoredWeight) -> bool:
    """Whether the CPU kernels read a matrix where it lies."""
    weight, scale, name, _ = stored
    return (
        name != "plain"
        and name in _cpu_formats()
        and type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and (scale is None or scale.is_contiguous())
    )


@functools.cache
def _cpu_formats() -> frozenset[str]:
    return frozenset(torch.ops.moesd.weight_format_names())


def _column_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """One output per row: a shared expert's gate, which goes through a sigmoid next."""
    out = _linear_forward(self, input)
    return rows_apart(out) if fits(input, self.weight, self.bias) else out


def _activation_forward(self: nn.Module, input: Tensor) -> Tensor:
    """The module's own activation on rows that are computed one by one."""
    return type(self).forward(self, rows_apart(input) if fits(input, input) else input)


@functools.cache
def _norm_forward(rule: NormRule) -> Callable[..., Tensor]:
    eps, offset, cast_first = rule.eps, rule.offset, rule.cast_first

    def forward(self: Any, *args: Any, **named: Any) -> Tensor:
        weight = self.weight
        if len(args) != 1 or named or not fits(args[0], weight):
            return type(self).forward(self, *args, **named)
        return torch.ops.moesd.rms_norm.default(args[0], weight, eps, offset, cast_first)

    return forward


_CHOICES = (
    *("top_k", "norm_topk_prob", "routed_scaling_factor"),
    *("n_group", "num_group", "topk_group"),
)


def _choices(router: nn.Module) -> tuple[Any, ...]:
    """Numbers that a user may set on a router at any time, and that its rule was read from."""
    return tuple(map(router.__dict__.get, _CHOICES))


@functools.cache
def _router_forward(rule: RouterRule, fuse: bool, choices: tuple[Any, ...]) -> Callable[..., Any]:
    def takes(self: Any, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
        weight = self.weight
        if len(args) != 1 or named or _choices(self) != choices or not weight.is_contiguous():
            return False
        return fits(args[0], weight, getattr(self, "bias", None))

    def fused(self: Any, *args: Any, **named: Any) -> Any:
        weight = self.weight
        if not takes(self, args, named):
            return type(self).forward(self, *args, **named)
        rows = args[0].reshape(-1, weight.shape[1])
        logits, weights, ids = torch.ops.moesd.softmax_topk_router.default(
            rows, weight, rule.top_k, rule.renormalize
        )
        return logits, weights.to(logits.dtype) if rule.cast else weights, ids

    def composed(self: Any, *args: Any, **named: Any) -> Any:
        weight = self.weight
        if not takes(self, args, named):
            return type(self).forward(self, *args, **named)
        (hidden_states,) = args
        rows, bias = hidden_states.reshape(-1, weight.shape[1]), getattr(self, "bias", None)
        logits = router_logits(rows, weight, bias, rule, linear=torch.ops.moesd.linear.default)
        chosen = rule.select(rows_apart(logits), correction_of(self), dtype=hidden_states.dtype)
        return tuple(chosen)

    fused.rule, fused.choices = rule, choices  # type: ignore[attr-defined]
    return fused if fuse else composed


def runs_linear(module: Any) -> bool:
    """Whether this is a linear layer on our kernel."""
    if shadow_of(module) is _stored_forward:
        return _readable(stored_weight(module))
    ours = type(module) is nn.Linear and shadow_of(module) is _linear_forward
    return ours and module.weight.is_contiguous()


def fused_router_of(module: nn.Module) -> RouterRule | None:
    """The rule of a router that is one op of ours; None for anything else."""
    function = shadow_of(module)
    choices = getattr(function, "choices", None)
    return function.rule if choices and choices == _choices(module) else None

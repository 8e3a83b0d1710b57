"""Gated MLPs on the CPU kernels: ``down(act(gate(x)) * up(x))``, the middle steps as one op."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moesd_kernels.experts.spec.activations import FUNCTIONS

from .gates import MAGNITUDES, recognise_gate
from .packed import linear_classes
from .shadow import fits, is_plain, shadow_of


@functools.cache
def activations() -> frozenset[type[nn.Module]]:
    """Classes of the activations in dense MLPs."""
    classes = {nn.SiLU, nn.GELU}
    try:
        from transformers.activations import GELUTanh, SiLUActivation
    except ImportError:
        return frozenset(classes)
    return frozenset(classes | {GELUTanh, SiLUActivation})


_MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def gated_mlp_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward for ``module`` if it is ``down(act(gate(x)) * up(x))``, else None."""
    parts = module._modules
    if (
        set(parts) != {*_MLP_PARTS, "act_fn"}
        or module._parameters
        or any(type(parts[name]) not in linear_classes() for name in _MLP_PARTS)
        or type(parts["act_fn"]) not in activations()
    ):
        return None
    gate = recognise_gate(module, gated=False) if is_plain(module.get_submodule("act_fn")) else None
    if gate is None or not _computes_gated(module, gate.activation):
        return None
    return _forward(gate.activation, _kind(parts["act_fn"]))


def _computes_gated(module: nn.Module, activation: str) -> bool:
    """Whether the class's forward is ``down(activation(gate(x)) * up(x))``, without a clamp.

    It is tried on small layers in place of the module's own.
    """
    generator = torch.Generator().manual_seed(0)
    # Uninitialised: drawing their weights would move the caller's random state.
    make = functools.partial(nn.utils.skip_init, nn.Linear, 5, 5, dtype=torch.float32)
    small = {name: make() for name in _MLP_PARTS}
    probe = copy.copy(module)
    probe._modules = module._modules | small
    x = torch.randn(4, 5, generator=generator, dtype=torch.float32)
    x = torch.cat([factor * x for factor in MAGNITUDES])
    with torch.no_grad():
        for linear in small.values():
            linear.weight.copy_(torch.randn(5, 5, generator=generator, dtype=torch.float32))
            linear.bias.zero_()
        try:
            expected = type(module).forward(probe, x)
        except Exception:  # whatever a class may do with parts that are not its own
            return False
        gate, up, down = (small[name] for name in _MLP_PARTS)
        actual = down(FUNCTIONS[activation](gate(x)) * up(x))
    return isinstance(expected, Tensor) and torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


def _kind(act_fn: Any) -> tuple[Any, ...]:
    """What tells an activation from another that is put in its place."""
    return type(act_fn), act_fn.__dict__.get("approximate"), is_plain(act_fn)


@functools.cache
def _forward(activation: str, kind: tuple[Any, ...]) -> Callable[..., Tensor]:
    def forward(self: Any, *args: Any, **named: Any) -> Tensor:
        # Whoever put another module in the layer's place may call "weight" anything, or a method.
        weight = getattr(self.down_proj, "weight", None)
        if (
            len(args) != 1
            or named
            or not isinstance(weight, Tensor)
            or not fits(args[0], weight)
            or _kind(self.act_fn) != kind
        ):
            return type(self).forward(self, *args, **named)
        (x,) = args
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.requires_grad or up.requires_grad:  # an adapter in front of frozen weights
            return type(self).forward(self, x)
        return self.down_proj(torch.ops.moesd.act_and_mul.default(gate, up, activation))

    forward.activation, forward.kind = activation, kind  # type: ignore[attr-defined]
    return forward


def gated_activation_of(module: nn.Module) -> str | None:
    """The activation of a gated MLP on our kernels; None for anything else."""
    function = shadow_of(module)
    kind = getattr(function, "kind", None)
    return function.activation if kind and kind == _kind(module._modules["act_fn"]) else None

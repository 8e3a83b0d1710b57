"""A module's forward, shadowed on the instance by one of ours, and when that one steps aside.

The class stays what it is. A shadow is a bound method called ``forward``, which is what lets the
module be copied and stored: a deep copy binds it to the copy, and a pickle holds a method's object
and name only, so that what is loaded, anywhere, has its class's own forward back.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moesd_kernels.transforms import is_transformed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORED = (torch.uint8, torch.int8, torch.float8_e4m3fn)  # of weights in quantised formats
_PLAIN = (nn.Parameter, Tensor)
_VECTOR = 32  # elements torch's loops take per step, at most


def require_model(model: object) -> None:
    """Refuse what is no model.

    Raises:
        TypeError: says what was expected and what came.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a loaded model, a torch.nn.Module, got {model!r:.80}")


def shadow(module: nn.Module, function: Callable[..., Any]) -> None:
    """Let ``function(module, *args)`` be the module's forward; a function of this package."""
    function.__name__ = "forward"
    module.forward = types.MethodType(function, module)


def shadow_of(module: nn.Module) -> Any:
    """Our function that shadows the module's forward, or None."""
    forward: Any = module.__dict__.get("forward")
    function = getattr(forward, "__func__", None)
    package = getattr(function, "__module__", "").rpartition(".")[0]
    ours = package == __package__ and forward.__self__ is module
    return function if ours else None


def unshadow(model: nn.Module) -> None:
    """Give every module of ``model`` whose forward is ours its own back."""
    for module in model.modules():
        if shadow_of(module) is not None:
            del module.forward


def is_unshadowed(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward: nobody's function shadows it."""
    forward = module.__dict__.get("forward")  # a pickle leaves the class's own there
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward, or ours for it, and nothing else."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and (is_unshadowed(module) or shadow_of(module) is not None)


def fits(x: Tensor, weight: Tensor, other: Tensor | None = None) -> bool:
    """Whether this call can take the CPU kernels, which nothing differentiates.

    A quantised weight goes with every dtype, and has no gradient, whatever its parameter says.
    ``other`` is what else the call may be differentiated by: a bias, a gate.
    """
    stored = weight.dtype in STORED
    return (
        (x.dtype == weight.dtype or stored)
        and x.dtype in DTYPES
        and x.device.type == "cpu"
        and type(weight) in _PLAIN
        and x.numel() > 0
        and not (
            torch.is_grad_enabled()
            and (
                x.requires_grad
                or (weight.requires_grad and not stored)
                or (other is not None and other.requires_grad)
            )
        )
        and not is_transformed()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def rows_apart(x: Tensor) -> Tensor:
    """``x``, or a copy whose rows do not follow each other in memory.

    torch's element-wise loops compute whole vectors of contiguous numbers with other instructions
    than what is left over, so where rows are not whole vectors, the last bits of a row depend on
    how many rows there are. A gap between rows makes each a loop of its own.
    """
    width = x.shape[-1]
    if width % _VECTOR == 0:
        return x
    return x.new_empty(*x.shape[:-1], width + 1)[..., :width].copy_(x)

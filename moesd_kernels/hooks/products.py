"""Linear layers on our kernel, also those that a module's own forward calls torch for.

The latter for routers that compute in a way of their own: their experts are then chosen by the same
numbers whatever a token is computed beside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .shadow import DTYPES, fits, rows_apart

# Computed by torch with other instructions where a vector is not full.
_CURVES = (torch.sigmoid, Tensor.sigmoid, F.softplus, torch.tanh, Tensor.tanh)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` on our kernel; ``takes`` says of what."""
    if x.dim() == 2:
        return torch.ops.moesd.linear.default(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return torch.ops.moesd.linear.default(rows, weight, bias).view(*x.shape[:-1], -1)


def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether ``linear`` can compute this call."""
    return weight.dtype in DTYPES and weight.is_contiguous() and fits(x, weight, bias)


def with_our_products(self: nn.Module, *args: Any, **named: Any) -> Any:
    """The forward of the module's class, as a shadow."""
    if torch.compiler.is_compiling():
        return type(self).forward(self, *args, **named)
    with _OurProducts():
        return type(self).forward(self, *args, **named)


class _OurProducts(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is F.linear and not kwargs and takes(*args):
            return linear(*args)
        if function in _CURVES and fits(args[0], args[0]):
            args = (rows_apart(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))

"""Element-wise functions of models' own code whose last bits are a row's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Those that torch computes in vectors by other instructions than what is left over.
_UNEVEN = {
    functional.softplus,
    functional.silu,
    functional.sigmoid,
    torch.sigmoid,
    Tensor.sigmoid,
}
_VECTORS = 64  # numbers that the widest loops take at once


class RowsApart(TorchFunctionMode):
    """In this block a token's gate does not depend on how many tokens there are.

    Where rows are not whole vectors, a gap after each makes it a loop of its own: what is left over
    then is the same whatever stands before it. (Linear layers of ours leave such gaps by
    themselves, but not what a model adds to them.)
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _UNEVEN and args and isinstance(args[0], Tensor) and not args[0].is_cuda:
            args = (rows_apart(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def rows_apart(x: Tensor) -> Tensor:
    """``x``, or a copy whose rows do not follow each other in memory.

    Rows are what lies together: the last axis, or the one before where ``x`` is transposed.
    """
    if not x.is_contiguous():
        is_transposed = x.ndim > 1 and x.mT.is_contiguous()
        return rows_apart(x.mT).mT if is_transposed else x
    width = x.shape[-1] if x.ndim else _VECTORS
    if width % _VECTORS == 0:
        return x
    return x.new_empty(*x.shape[:-1], width + 1)[..., :width].copy_(x)

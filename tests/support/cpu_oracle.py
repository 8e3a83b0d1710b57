"""The two-reference oracle: at most twice as wrong as eager PyTorch, against fp64, per group."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_twice_as_good(name: str, actual: Tensor, baseline: Tensor, exact: Tensor) -> None:
    """Raise unless every element of `actual` errs at most twice as much as `baseline` errs at all.

    Args:
        name: what is compared, for the message.
        actual: the result under test, any shape.
        baseline: eager PyTorch's result in the same dtype.
        exact: the fp64 result.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
    budget = 2 * ((baseline.double() - exact).abs().max() + rounding)
    if not bool((error <= budget).all()):  # also catches NaN
        at = torch.unravel_index(error.nan_to_num(float("inf")).argmax(), error.shape)
        worst = tuple(int(i) for i in at)
        raise AssertionError(f"{name}: error {error[worst]:.2e} > {budget:.2e} at {worst}")

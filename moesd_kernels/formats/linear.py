"""A linear layer whose matrix stays in a weight format, and what keeps scales as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .activations import activation_group, round_straight_through
from .check import check_weight
from .description import WeightFormat


class KeepsScales(nn.Module):
    """A module whose scales keep their dtype when the model is converted to another.

    ``model.to(torch.float16)`` means the numbers a model computes with; a scale in another dtype
    would be another weight.
    """

    scale_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scales = [self._parameters.get(name) for name in self.scale_names]
        before = [None if scale is None else scale.data for scale in scales]
        super()._apply(fn, recurse)
        for name, scale in zip(self.scale_names, before, strict=True):
            converted = self._parameters.get(name)
            if scale is not None and converted is not None and converted.dtype != scale.dtype:
                converted.data = scale.to(converted.device)
        return self


class QuantizedLinear(KeepsScales):
    """``x @ W.T + bias`` with W in a quantised weight format.

    Args:
        weight: as ``weight_format`` stores ``[out_features, in_features]``.
        scale: its scales, or None.
        bias: ``[out_features]`` in the dtype of the hidden states, or None.
        weight_format: how ``weight`` is stored.

    Attributes:
        int8_activations: whether inputs are rounded to eight bits (``round_to_int8``) before the
            product, where W is of integers; see ``moesd_kernels.use_int8_activations``.

    Raises:
        TypeError: a dtype is not that of the format, or a scale is missing or too much.
        ValueError: a shape is not.
    """

    scale_names = ("weight_scale",)

    def __init__(
        self, weight: Tensor, scale: Tensor | None, bias: Tensor | None, weight_format: WeightFormat
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape[0], weight_format.depth(weight)
        shape = self.out_features, self.in_features
        check_weight("weight", weight, scale, weight_format, shape)
        self.weight_format = weight_format.name
        self._stored_as = weight_format
        self.int8_activations = False
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]: the matrix is read anew at each call.

        Raises:
            TypeError: ``input`` is not floating, as where it was converted to ``weight.dtype``.
        """
        if not input.is_floating_point():
            raise TypeError(f"input must be floating, got {input.dtype}")
        weight = self._stored_as.decode(self.weight, self.weight_scale)
        if self.int8_activations and self._stored_as.integers:
            group = activation_group(self.weight_format, self.weight_scale, self.in_features)
            product = F.linear(round_straight_through(input, group), weight)
            return (product if self.bias is None else product + self.bias).to(input.dtype)
        return F.linear(input, weight.to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the name."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight_format={self.weight_format}"
            f"{', int8_activations=True' if self.int8_activations else ''}"
        )

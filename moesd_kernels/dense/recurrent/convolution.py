"""The short convolution before a recurrence in PyTorch: the definition of the compiled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from moesd_kernels.experts.spec.activations import FUNCTIONS


def short_convolution(
    window: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Depthwise causal convolution: ``out[t] = act(bias + sum_w weight[w] window[t + w])``.

    Sums are in fp32, or in fp64 of fp64, and rounded to the dtype of the window before the
    activation and after it, as transformers' convolutions round.

    Args:
        window: ``[B, W - 1 + Q, C]``, the W - 1 inputs before the first token and the tokens.
        weight: ``[C, W]`` in the dtype of the window.
        bias: ``[C]``, likewise.
        activation: a key of ``experts.spec.activations.FUNCTIONS`` ("silu").

    Returns:
        ``[B, Q, C]`` in the dtype of the window.
    """
    wide = torch.promote_types(window.dtype, torch.float32)
    taps = weight.shape[1]
    tokens = window.shape[1] - taps + 1
    total = torch.zeros_like(window[:, :tokens], dtype=wide)
    if bias is not None:
        total += bias.to(wide)
    for tap in range(taps):
        total += weight[:, tap].to(wide) * window[:, tap : tap + tokens].to(wide)
    out = total.to(window.dtype)
    return out if activation is None else FUNCTIONS[activation](out.to(wide)).to(window.dtype)

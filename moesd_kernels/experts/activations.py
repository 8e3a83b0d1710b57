"""The expert's activation: names, gate variants, and their PyTorch definition.

The definitions here are the specification for every back-end; they run in the dtype they are given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
# Names models use in `config.hidden_act` for the same functions.
ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def canonical_activation(name: str) -> str:
    """The name in ``FUNCTIONS`` for `name` or one of its aliases.

    Raises:
        ValueError: Unknown activation.
    """
    canonical = ALIASES.get(name, name)
    if canonical not in FUNCTIONS:
        known = sorted([*FUNCTIONS, *ALIASES])
        raise ValueError(f"activation must be one of {known}, got {name!r}")
    return canonical


def split_gate_up(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up parts of [N, 2I]: two halves, or even and odd columns when interleaved."""
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


def apply_activation(
    projected: Tensor,
    *,
    activation: str,
    gated: bool,
    interleaved: bool,
    limit: float | None,
    alpha: float | None,
) -> Tensor:
    """``act(gate) * up``, clamped by `limit`; with `alpha`, ``gate * σ(alpha * gate) * (up + 1)``.

    Args:
        projected: [N, 2I] gate and up projections, or [N, I] when not gated.
        activation: A key of ``FUNCTIONS``; not used when `alpha` is given.
        gated: Whether `projected` holds a gate.
        interleaved: Gate and up alternate column by column (gpt-oss).
        limit: Gate is clamped from above and up on both sides, before the activation.
        alpha: Slope of gpt-oss's gate.

    Returns:
        [N, I] in the dtype of `projected`.
    """
    if not gated:
        return FUNCTIONS[activation](projected)
    gate, up = split_gate_up(projected, interleaved)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if alpha is not None:
        return gate * (alpha * gate).sigmoid() * (up + 1)
    return FUNCTIONS[activation](gate) * up

"""The activations by name: the table that Triton's and C++'s names are tested to be equal to.

The functions are the specification for every back-end; they run in the dtype they are given.
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
# Names models use in `config.hidden_act` for the same functions. Back-ends never see them.
ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def canonical_activation(name: str) -> str:
    """The name in ``FUNCTIONS`` for ``name`` or one of its aliases.

    Raises:
        ValueError: unknown activation.
    """
    canonical = ALIASES.get(name, name)
    if canonical not in FUNCTIONS:
        known = sorted([*FUNCTIONS, *ALIASES])
        raise ValueError(f"activation must be one of {known}, got {name!r}")
    return canonical

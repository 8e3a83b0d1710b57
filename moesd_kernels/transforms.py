"""What no kernel knows of: derivatives carried forward, and transforms of ``torch.func``."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def in_torch_func() -> bool:
    """Whether a transform runs: a tensor inside may say that it asks for no gradient."""
    return not is_compiling() and torch._C._are_functorch_transforms_active()


def is_transformed() -> bool:
    """Whether one runs, or derivatives are being carried forward."""
    return forward_ad._current_level >= 0 or in_torch_func()

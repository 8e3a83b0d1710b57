"""Triton back-end: the expert layer in two to four launches, chained on Hopper.

Importing this package needs neither Triton nor a GPU; calling it does.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


def unavailable_reason() -> str | None:
    """Why Triton kernels cannot run in this process, or None."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"triton is {triton.__version__}, 3.6 or newer is needed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability is {torch.cuda.get_device_capability()}, (8, 0) is needed"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set"
    return None


def fused_experts_triton(*args: Any, **kwargs: Any) -> Tensor:
    """See ``moesd_kernels.experts.triton.launch.fused_experts_triton``."""
    from .launch import fused_experts_triton as launch

    return launch(*args, **kwargs)


__all__ = ["fused_experts_triton", "unavailable_reason"]

"""The one place where the decoder meets ``moesd_kernels``. Everything works without it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from .attention import RaggedOp

logger = logging.getLogger(__name__)


def accelerate(model: torch.nn.Module) -> bool:
    """Let ``moesd_kernels`` run the model's experts, linears, norms and routers.

    Returns:
        Whether it did; when it could not, one log line says why and the model is unchanged.
    """
    try:
        import moesd_kernels

        moesd_kernels.accelerate(model)
    except (ImportError, NotImplementedError, RuntimeError) as error:
        logger.warning(
            "moesd_kernels not used for %s (%s: %s)",
            type(model).__name__,
            type(error).__name__,
            error,
        )
        return False
    return True


def ragged_attention_op(device: torch.device, dtype: torch.dtype) -> RaggedOp | None:
    """The attention kernel for this device and dtype, or ``None``: portable forms then."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return _op("ragged_attention")


@functools.cache
def argmax_op(device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """``logits [..., V] -> (places [...], undefined [...])`` in one op, or ``None``."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return _op("argmax")


@functools.cache
def nucleus_op(device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """``(probs [..., V], top_p [..., 1]) -> threshold [..., 1]`` in one launch, or ``None``."""
    if device.type != "cuda" or dtype != torch.float32:
        return None
    try:
        from moesd_kernels.experts import triton as kernels
    except ImportError:
        return None
    if kernels.unavailable_reason() is not None:
        return None
    from moesd_kernels.dense.nucleus_kernel import nucleus_threshold

    return nucleus_threshold


def _op(name: str) -> Any:
    try:
        from moesd_kernels.dense import ops
    except ImportError:
        return None
    if ops.unavailable() is not None:
        return None
    return getattr(torch.ops.moesd, name).default


def layer_stack() -> Any:
    """An empty ``LayerStack``; there is one wherever there is the attention kernel."""
    from moesd_kernels.hooks.layer_stack import layer_stack

    return layer_stack()


def set_mlp(stack: Any, module: torch.nn.Module) -> bool:
    """Whether the stack runs this MLP as that of the layer added last."""
    from moesd_kernels.hooks.layer_stack import set_mlp

    return set_mlp(stack, module)

"""The one place where the decoder meets ``moesd_kernels``. Everything works without it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from decoder.errors import UserError, explained

logger = logging.getLogger(__name__)

RaggedOp = Callable[..., Tensor]

AttentionName = Literal["auto", "portable"]
# "auto" uses the attention kernel where there is one, "portable" never does.
ATTENTION: tuple[str, ...] = get_args(AttentionName)

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accelerate(model: torch.nn.Module) -> bool:
    """Let ``moesd_kernels`` run the model's experts, linears, norms and routers.

    Returns:
        Whether it did; when it could not, one log line says why and the model is unchanged.

    Raises:
        UserError: ``MOESD_CPU_ISA`` names no instruction set of this processor.
    """
    if any(parameter.device.type == "cpu" for parameter in model.parameters()):
        _check_instruction_set(_cpu_ops(torch.device("cpu"), torch.float32))
    try:
        import moesd_kernels

        moesd_kernels.accelerate(model)
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        logger.warning(
            "moesd_kernels not used for %s (%s: %s)",
            type(model).__name__,
            type(error).__name__,
            error,
        )
        return False
    return True


def cache_folder(name: str) -> Path:
    """This user's folder ``name`` of the cache, made where it is not there.

    Raises:
        UserError: it cannot be made, or others could have written to it.
    """
    with explained(f"there is no cache folder {name!r}"):
        from moesd_kernels.cache import cache_folder

        return cache_folder(name)


def locked(folder: Path) -> AbstractContextManager[None]:
    """A block that holds a folder of the cache; whoever else wants it waits."""
    from moesd_kernels.cache import locked

    return locked(folder)


def left_as_found(model: torch.nn.Module) -> AbstractContextManager[None]:
    """A block that takes back what it made of ``model``'s experts and forwards if it raises."""
    try:
        from moesd_kernels.hooks.accelerate import left_as_found
    except ImportError:
        return nullcontext()
    return left_as_found(model)


def ragged_attention_op(
    device: torch.device, dtype: torch.dtype, attention: AttentionName = "auto"
) -> RaggedOp | None:
    """The attention kernel for this device and dtype, or ``None``: portable forms then.

    Raises:
        ValueError: ``attention`` is none of ``ATTENTION``.
        UserError: ``MOESD_CPU_ISA`` names no instruction set of this processor.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    ops = _cpu_ops(device, dtype) if attention == "auto" else None
    _check_instruction_set(ops)
    return None if ops is None else ops.ragged_attention.default


@functools.cache
def argmax_op(device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """``logits [..., V] -> (places [...], undefined [...])`` in one op, or ``None``."""
    ops = _cpu_ops(device, dtype)
    return None if ops is None else ops.argmax.default


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


def _cpu_ops(device: torch.device, dtype: torch.dtype) -> Any | None:
    """``torch.ops.moesd`` where tensors of this kind have C++ operators, or ``None``."""
    if device.type != "cpu" or dtype not in _CPU_DTYPES:
        return None
    try:
        from moesd_kernels.dense import ops
    except ImportError:
        return None
    return None if ops.unavailable() is not None else torch.ops.moesd


def _check_instruction_set(ops: Any | None) -> None:
    """Have it chosen now: the first operator would raise it, and be blamed for it."""
    try:
        if ops is not None:
            ops.cpu_isa()
    except RuntimeError as error:
        raise UserError(str(error).partition("\n")[0]) from error


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of ``x [T, H]``; there is one wherever there is the attention kernel."""
    return torch.ops.moesd.rms_norm.default(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta`` and its ``rms_norm``, both ``[T, H]``."""
    return torch.ops.moesd.add_rms_norm.default(x, delta, weight, eps)


def layer_stack() -> Any:
    """An empty ``LayerStack``; likewise."""
    from moesd_kernels.hooks.layer_stack import layer_stack

    return layer_stack()


def set_mlp(stack: Any, module: torch.nn.Module) -> bool:
    """Whether the stack runs this MLP as that of the layer added last."""
    from moesd_kernels.hooks.layer_stack import set_mlp

    return all(map(is_plain, module.modules())) and set_mlp(stack, module)


def is_plain(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs its class's forward, or ours for it, and nothing else."""
    from moesd_kernels.hooks.shadow import is_unshadowed, shadow_of

    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and (is_unshadowed(module) or shadow_of(module) is not None)


def runs_linear(module: torch.nn.Module) -> bool:
    """Whether this is a plain linear layer on our kernel."""
    from moesd_kernels.hooks.dense import runs_linear

    return is_plain(module) and runs_linear(module)


def runs_norm(module: torch.nn.Module) -> bool:
    """Whether this is a plain norm on our kernel."""
    from moesd_kernels.hooks.shadow import shadow_of

    return is_plain(module) and shadow_of(module) is not None

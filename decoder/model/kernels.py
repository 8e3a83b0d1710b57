"""The one place where the decoder meets ``moesd_kernels``. Everything works without it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from decoder.errors import UserError, explained

logger = logging.getLogger(__name__)

RaggedOp = Callable[..., Tensor]

AttentionName = Literal["auto", "portable"]
# "auto" uses the attention kernel where there is one, "portable" never does.
ATTENTION: tuple[str, ...] = get_args(AttentionName)

QUANTIZED = ("int8", "int4")  # weight formats that plain weights can be turned into
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accelerate(model: torch.nn.Module) -> bool:
    """Let ``moesd_kernels`` run the model's experts, linears, norms and routers.

    With the settings of an earlier ``moesd_kernels.accelerate``, if its owner has called that.

    Returns:
        Whether it did; when it could not, one log line says why and the model is unchanged.

    Raises:
        UserError: ``MOESD_CPU_ISA`` names no instruction set of this processor.
    """
    if any(parameter.device.type == "cpu" for parameter in model.parameters()):
        _check_instruction_set(_cpu_ops(torch.device("cpu"), torch.float32))
    try:
        import moesd_kernels
        from moesd_kernels.hooks.experts import settings_of

        moesd_kernels.accelerate(model, **settings_of(model)._asdict())
    except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        names = type(model).__name__, type(error).__name__
        logger.warning("moesd_kernels not used for %s (%s: %s)", *names, error)
        return False
    return True


def quantized(model: torch.nn.Module, weight_format: str) -> torch.nn.Module:
    """``model``, its matrices now in one of ``QUANTIZED``; ``UserError`` where none can be."""
    import moesd_kernels

    with explained(f"{type(model).__name__} cannot be {weight_format}"):
        return moesd_kernels.quantize(model, weight_format)


def keeping_quantized() -> AbstractContextManager[None]:
    """A block in which transformers leaves the weights of FP8 and MXFP4 files as they are."""
    import moesd_kernels

    return moesd_kernels.keep_quantized()


def load_gguf(file: Path, dtype: torch.dtype) -> Any:
    """The model of a GGUF file, its matrices in the file's blocks."""
    import moesd_kernels

    return moesd_kernels.load_gguf(file, dtype)


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
    if attention == "auto" and on_gpu(device) and dtype in _DTYPES:
        from moesd_kernels.dense.triton import attention as kernels

        return _guarded(kernels.ragged_attention)
    ops = _cpu_ops(device, dtype) if attention == "auto" else None
    _check_instruction_set(ops)
    return None if ops is None else ops.ragged_attention.default


@functools.cache
def argmax_op(device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """``logits [..., V] -> (places [...], undefined [...])`` in one op, or ``None``."""
    if on_gpu(device) and dtype in _DTYPES:
        from moesd_kernels.dense.triton.argmax_kernel import argmax

        return _guarded(argmax)
    ops = _cpu_ops(device, dtype)
    return None if ops is None else ops.argmax.default


@functools.cache
def sampling_ops(device: torch.device, dtype: torch.dtype) -> Any | None:
    """The sampler's ``probs``, ``race``, ``rejection`` and ``agree`` as kernels, or ``None``."""
    if not on_gpu(device) or dtype not in _DTYPES:
        return None
    from moesd_kernels.dense.triton.sampling import ops

    names = ("probs", "race", "rejection", "agree")
    return SimpleNamespace(**{name: _guarded(getattr(ops, name)) for name in names})


@functools.cache
def on_gpu(device: torch.device) -> bool:
    """Whether tensors of this device have Triton kernels."""
    if device.type != "cuda":
        return False
    try:
        from moesd_kernels.experts import triton as kernels
    except ImportError:
        return False
    return kernels.unavailable_reason() is None


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the device of its first tensor current: Triton launches on that one."""

    @functools.wraps(function)
    def run(first: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device(first.device if first.is_cuda else -1):
            return function(first, *arguments, **options)

    return run


def _cpu_ops(device: torch.device, dtype: torch.dtype) -> Any | None:
    """``torch.ops.moesd`` where tensors of this kind have C++ operators, or ``None``."""
    if device.type != "cpu" or dtype not in _DTYPES:
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
    if on_gpu(x.device):
        from moesd_kernels.dense.triton import norm_kernel

        return _guarded(norm_kernel.rms_norm)(x, weight, eps)
    return torch.ops.moesd.rms_norm.default(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta`` and its ``rms_norm``, both ``[T, H]``."""
    if on_gpu(x.device):
        from moesd_kernels.dense.triton import norm_kernel

        return _guarded(norm_kernel.add_rms_norm)(x, delta, weight, eps)
    return torch.ops.moesd.add_rms_norm.default(x, delta, weight, eps)


def layer_stack(model: torch.nn.Module) -> Any:
    """An empty stack of layers on the model's device; likewise."""
    if on_gpu(_device_of(model)):
        from moesd_kernels.hooks.device_stack import DeviceStack

        return DeviceStack(_is_batch_invariant(model))
    from moesd_kernels.hooks.layer_stack import layer_stack

    return layer_stack()


def run_layers(
    stack: Any, length: int, x: Tensor, *arguments: Any, most: int | None
) -> tuple[Tensor, Tensor, int]:
    """``stack.run``; a GPU's also wants to know that no position reaches ``length``, and gives a
    token ``most`` experts."""
    if on_gpu(x.device):
        return _guarded(stack.run)(x, *arguments, length, most)
    return stack.run(x, *arguments)


def head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """The model's head or, where rows are not to depend on the batch, its product in order."""
    head = model.get_output_embeddings()
    if not (on_gpu(_device_of(model)) and _is_batch_invariant(model) and runs_linear(head)):
        return head
    from moesd_kernels.hooks.device_stack import product

    def run(states: Tensor) -> Tensor:
        logits = _guarded(product)(states.flatten(0, -2), head.weight, head.bias, True)
        return logits.unflatten(0, states.shape[:-1])

    return run


def _is_batch_invariant(model: torch.nn.Module) -> bool:
    """Whether its owner asked for it when the model was accelerated."""
    from moesd_kernels.hooks.experts import settings_of

    return settings_of(model).batch_invariant


def set_mlp(stack: Any, module: torch.nn.Module) -> bool:
    """Whether the stack runs this MLP as that of the layer added last."""
    if not all(map(is_plain, module.modules())):
        return False
    if on_gpu(_device_of(module)):
        from moesd_kernels.hooks.device_blocks import block_of

        block = block_of(module, stack.batch_invariant)
        stack.set_block(block)
        return block is not None
    from moesd_kernels.hooks.layer_stack import set_mlp

    return set_mlp(stack, module)


def same_states(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two forwards' states ``[T, H]`` are one: to the bit, or on a GPU to rounding."""
    if not on_gpu(ours.device):
        return torch.equal(ours, theirs)
    from moesd_kernels.hooks.device_blocks import rows_alike

    return rows_alike(ours, theirs)


def stored_weight(linear: torch.nn.Module) -> tuple[Any, Any, Any]:
    """Weight, scale or ``None``, and weight format of a linear layer that ``runs_linear``."""
    from moesd_kernels.hooks.packed import stored_weight

    return stored_weight(linear)


def joined(parameters: list[torch.nn.Parameter]) -> Tensor:
    """The parameters as one tensor along dimension 0, of which they become views."""
    from moesd_kernels.hooks import joined

    return joined.joined(parameters)


def may_join(parameters: list[torch.nn.Parameter]) -> bool:
    """Whether ``joined`` takes nobody else's memory away."""
    from moesd_kernels.hooks import joined

    return joined.may_join(parameters)


def is_plain(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs its class's forward, or ours for it, and nothing else."""
    from moesd_kernels.hooks.shadow import is_unshadowed, shadow_of

    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and (is_unshadowed(module) or shadow_of(module) is not None)


def runs_linear(module: torch.nn.Module) -> bool:
    """Whether this is a plain linear layer, on a CPU on our kernel."""
    if on_gpu(_device_of(module)):
        from moesd_kernels.hooks.device_blocks import takes_linear

        return is_plain(module) and takes_linear(module)
    from moesd_kernels.hooks.dense import runs_linear

    return is_plain(module) and runs_linear(module)


def runs_norm(module: torch.nn.Module) -> bool:
    """Whether this is a plain norm that our kernel computes."""
    if on_gpu(_device_of(module)):
        from moesd_kernels.hooks.device_blocks import takes_norm

        return is_plain(module) and takes_norm(module)
    from moesd_kernels.hooks.shadow import shadow_of

    return is_plain(module) and shadow_of(module) is not None


def _device_of(module: torch.nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))

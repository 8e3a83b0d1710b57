"""What a walk needs, on whichever device the model is: stacks, norms, and what they take over."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moesd_kernels.experts import triton as kernels
from moesd_kernels.registered import guarded

from ..experts import settings_of
from ..shadow import is_plain, shadow_of


@functools.cache
def on_gpu(device: torch.device) -> bool:
    """Whether tensors of this device have Triton kernels."""
    return device.type == "cuda" and kernels.unavailable_reason() is None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of ``x [T, H]``."""
    if on_gpu(x.device):
        from moesd_kernels.dense.triton import norm_kernel

        return guarded(norm_kernel.rms_norm)(x, weight, eps)
    return torch.ops.moesd.rms_norm.default(x, weight, eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta`` and its ``rms_norm``, both ``[T, H]``."""
    if on_gpu(x.device):
        from moesd_kernels.dense.triton import norm_kernel

        return guarded(norm_kernel.add_rms_norm)(x, delta, weight, eps)
    return torch.ops.moesd.add_rms_norm.default(x, delta, weight, eps)


def layer_stack(model: nn.Module) -> Any:
    """An empty stack of layers on the model's device."""
    if on_gpu(_device_of(model)):
        from .device_stack import DeviceStack

        return DeviceStack(settings_of(model).batch_invariant)
    from .cpu_stack import layer_stack

    return layer_stack()


def run_layers(
    stack: Any, length: int, x: Tensor, *arguments: Any, most: int | None
) -> tuple[Tensor, Tensor, int]:
    """``stack.run``; a GPU's also wants to know that no position reaches ``length``, and gives a
    token ``most`` experts."""
    if on_gpu(x.device):
        return guarded(stack.run)(x, *arguments, length, most)
    return stack.run(x, *arguments)


def head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """The model's head or, where rows are not to depend on the batch, its product in order."""
    head = model.get_output_embeddings()
    ordered = on_gpu(_device_of(model)) and settings_of(model).batch_invariant
    if not (ordered and runs_linear(head)):
        return head
    from .device_stack import product

    def run(states: Tensor) -> Tensor:
        logits = guarded(product)(states.flatten(0, -2), head.weight, head.bias, True)
        return logits.unflatten(0, states.shape[:-1])

    return run


def set_mlp(stack: Any, module: nn.Module) -> bool:
    """Whether the stack runs this MLP as that of the layer added last."""
    if not all(map(is_plain, module.modules())):
        return False
    if on_gpu(_device_of(module)):
        from .device_blocks import block_of

        block = block_of(module, stack.batch_invariant)
        stack.set_block(block)
        return block is not None
    from .cpu_stack import set_mlp

    return set_mlp(stack, module)


def states_apart(ours: Tensor, theirs: Tensor) -> float:
    """How far our states ``[T, H]`` are from theirs: on a GPU as a share of these, elsewhere any
    other bit is too far."""
    if not on_gpu(ours.device):
        return 0.0 if torch.equal(ours, theirs) else math.inf
    from .device_blocks import rows_apart

    return rows_apart(ours, theirs)


def runs_linear(module: nn.Module) -> bool:
    """Whether this is a plain linear layer, on a CPU on our kernel."""
    if on_gpu(_device_of(module)):
        from .device_blocks import takes_linear

        return is_plain(module) and takes_linear(module)
    from ..dense import runs_linear

    return is_plain(module) and runs_linear(module)


def runs_norm(module: nn.Module) -> bool:
    """Whether this is a plain norm that our kernel computes."""
    if on_gpu(_device_of(module)):
        from .device_blocks import takes_norm

        return is_plain(module) and takes_norm(module)
    return is_plain(module) and shadow_of(module) is not None


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
